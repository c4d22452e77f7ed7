"""An operation on arrays by the functions of a backend, whatever the arrays are: checks, sizes, the call.

An operation is named by its kind, "Depthwise", "Pointwise" or "Separable"; `named` holds its attributes by name, as
`static_shapes.window` gives them. Arrays are C-contiguous and channels-last, of one dtype. Those for the results come
from `new(index, shape)`, the index that of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

from .. import checks
from ..kernels.geometry import Geometry, resolve
from .static_shapes import output_shape

Shape = tuple[int, ...]
New = Callable[[int, Shape], Any]


def forward(backend: ModuleType, kind: str, operands: Sequence[Any], bias: Any, named: dict, new: New) -> Any:
    """y `[N,P,Q,F]` from the operands, x and the kernels, and the bias or None; no less than 0 if `named` says "relu",
    as if x were none if it says "relu_x".

    Raises:
        ValueError: a shape is wrong.
    """
    x, *kernels = operands
    y = new(0, _output_shape(operands, bias, named))
    clamp = (0.0 if named.get("relu") else -math.inf, math.inf)
    relu_x = bool(named.get("relu_x"))
    if kind == "Depthwise":
        backend.depthwise_forward(_geometry(operands, named), x, *kernels, bias, y, clamp, relu_x)
    elif kind == "Separable":
        depthwise, pointwise = kernels
        g = _geometry(operands, named)
        backend.separable_forward(g, x, depthwise, _matrix(pointwise), bias, y, clamp, relu_x)
    else:
        backend.pointwise_forward(_matrix(x), _matrix(kernels[0]), bias, _matrix(y), clamp)
    return y


def backward(
    backend: ModuleType, kind: str, operands: Sequence[Any], dy: Any, named: dict, wanted: Sequence[bool], new: New
) -> list[Any]:
    """The gradients of the operands and of the bias for the output's gradient dy; None for those not wanted.

    Raises:
        ValueError: a shape is wrong.
    """
    expected = _output_shape(operands, None, named)
    if tuple(dy.shape) != expected:
        raise checks.invalid("dy", f"shape {expected}, that of the output", dy.shape, ".shape")
    x, *kernels = operands
    shapes = [*(operand.shape for operand in operands), dy.shape[-1:]]
    gradients = [new(i, shape) if wanted[i] else None for i, shape in enumerate(shapes)]
    if kind == "Depthwise":
        backend.depthwise_backward(_geometry(operands, named), x, *kernels, dy, *gradients)
    elif kind == "Separable":
        depthwise, pointwise = kernels
        dx, d_depthwise, d_pointwise, d_bias = gradients
        backend.separable_backward(
            _geometry(operands, named), x, depthwise, _matrix(pointwise), dy,
            dx, d_depthwise, _matrix(d_pointwise), d_bias,
        )  # fmt: skip
    else:
        dx, d_kernel, d_bias = gradients
        backend.pointwise_backward(_matrix(x), _matrix(kernels[0]), _matrix(dy), _matrix(dx), _matrix(d_kernel), d_bias)
    return gradients


def _output_shape(operands: Sequence[Any], bias: Any, named: dict) -> Shape:
    shapes = [tuple(operand.shape) for operand in operands]
    return cast(Shape, output_shape(shapes, None if bias is None else tuple(bias.shape), named))


def _geometry(operands: Sequence[Any], named: dict) -> Geometry:
    top, bottom, left, right = named["padding"]
    padding = "same" if named["same"] else ((top, bottom), (left, right))
    return resolve(operands[0].shape, operands[1].shape, named["strides"], padding, named["dilations"])


def _matrix(array: Any) -> Any:
    """A view `[rows, last size]` of a contiguous array."""
    return None if array is None else array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
