"""PyTorch tensors to the kernels' addresses: what an operator does when it runs.

Checks, memory and dtypes are the same on every device; `_DEVICES` says who computes on which. Memory for the results
comes from PyTorch's own allocator, inputs are copied only where they are not contiguous or of a half type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .. import checks, dispatch
from ..kernels.cpu import depthwise, pointwise, separable, threads
from .static_shapes import Attributes, output_shape

OPERANDS = {
    "separable": ("x", "depthwise_kernel", "pointwise_kernel"),
    "depthwise": ("x", "depthwise_kernel"),
    "pointwise": ("x", "pointwise_kernel"),
}

_WORKING = {  # what is computed in, for each dtype that is taken
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
_MODULES = {"separable": separable, "depthwise": depthwise, "pointwise": pointwise}
_SCALARS = {torch.float32: np.float32, torch.float64: np.float64}

Shape = tuple[int, ...]
Run = Callable[..., None]


def result_shape(kind: str, tensors: Mapping[str, torch.Tensor | None], attributes: Attributes) -> Shape:
    """`[N,P,Q,F]` for an operation's tensors by name: its operands, and the bias (or None) or dy.

    Works on sizes that are symbols too. Raises ValueError or TypeError where a tensor does not fit the others.
    """
    _check(tensors)
    shapes = [tuple(tensors[name].shape) for name in OPERANDS[kind]]
    bias = tensors.get("bias")
    shape = output_shape(shapes, None if bias is None else tuple(bias.shape), attributes)
    if kind != "pointwise":  # also holds the kernel to the image, and its span to what kernels can count
        _geometry(shapes, attributes)
    if "dy" in tensors:
        checks.shape("dy", tensors["dy"], shape, "the output's shape")
    return shape


def forward(kind: str, operands: Sequence[torch.Tensor], bias: torch.Tensor | None, attributes: Attributes):
    """The output `[N,P,Q,F]` for channels-last operands of one dtype, contiguous, of that dtype."""
    shape = result_shape(kind, {**_named(kind, operands), "bias": bias}, attributes)
    x = operands[0]
    working = _WORKING[x.dtype]
    y = x.new_empty(shape, dtype=working)
    inputs = [None if tensor is None else tensor.to(working).contiguous() for tensor in (*operands, bias)]
    _run_on(x.device)(kind, "forward", _sizes(kind, operands, shape, attributes), [*inputs, y])
    return y.to(x.dtype)


def backward(
    kind: str, operands: Sequence[torch.Tensor], dy: torch.Tensor, attributes: Attributes, wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The gradients of the operands and of the bias for the output's gradient dy; empty where not wanted."""
    shape = result_shape(kind, {**_named(kind, operands), "dy": dy}, attributes)
    x = operands[0]
    working = _WORKING[x.dtype]
    shapes = gradient_shapes(operands, dy, wanted)
    gradients = [x.new_empty(shape, dtype=working) for shape in shapes]
    inputs = [tensor.to(working).contiguous() for tensor in (*operands, dy)]
    targets = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    _run_on(x.device)(kind, "backward", _sizes(kind, operands, shape, attributes), [*inputs, *targets])
    return [gradient.to(x.dtype) for gradient in gradients]


def gradient_shapes(operands: Sequence[torch.Tensor], dy: torch.Tensor, wanted: Sequence[bool]) -> list[Shape]:
    """The shapes of what `backward` returns."""
    shapes = [*(tuple(operand.shape) for operand in operands), tuple(dy.shape[-1:])]
    if len(wanted) != len(shapes):
        raise checks.invalid("wanted", f"{len(shapes)} truth values", list(wanted))
    return [shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True)]


def _named(kind: str, operands: Sequence[torch.Tensor]) -> dict[str, torch.Tensor | None]:
    return dict(zip(OPERANDS[kind], operands, strict=True))


def _check(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Hold all to x's device and dtype: raw addresses tell neither."""
    x = tensors["x"]
    if x.dtype not in _WORKING:
        raise checks.invalid("x", "dtype " + ", ".join(checks.FLOAT_NAMES), x.dtype, ".dtype", TypeError)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise checks.invalid(name, "a dense tensor", tensor.layout, ".layout", TypeError)
        if tensor.dtype is not x.dtype:
            raise checks.invalid(name, f"x's dtype, {x.dtype}", tensor.dtype, ".dtype", TypeError)
        if tensor.device != x.device:
            raise checks.invalid(name, f"a tensor on x's device, {x.device}", str(tensor.device), ".device")


def _geometry(shapes: Sequence[Shape], attributes: Attributes):
    top, bottom, left, right = attributes["padding"]
    padding = "same" if attributes["same"] else ((top, bottom), (left, right))
    strides, dilations = tuple(attributes["strides"]), tuple(attributes["dilations"])
    return checks.geometry(shapes[0], shapes[1], strides, padding, dilations)


def _sizes(kind: str, operands: Sequence[torch.Tensor], shape: Shape, attributes: Attributes) -> tuple[Any, ...]:
    """What the kernels of an operation take before the addresses."""
    shapes = [tuple(operand.shape) for operand in operands]
    if kind == "pointwise":
        return prod(shape[:-1]), shapes[0][-1], shape[-1]
    g = _geometry(shapes, attributes)
    return (g,) if kind == "depthwise" else (g, shape[-1])


def _on_cpu(kind: str, way: str, sizes: tuple[Any, ...], tensors: Sequence[torch.Tensor | None]) -> None:
    """Run the kernel of an operation ("forward" or "backward") on contiguous tensors of one dtype, inputs first."""
    module: ModuleType = _MODULES[kind]
    scalar = _SCALARS[tensors[0].dtype]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    bounds = (scalar(-np.inf), scalar(np.inf)) if way == "forward" else ()
    getattr(module, way)(scalar, *sizes, *addresses, *bounds, threads.get_num_threads())


_DEVICES: dict[str, Run] = {"cpu": _on_cpu}


def _run_on(device: torch.device) -> Run:
    """What computes on `device`, as `_on_cpu` does on the CPU.

    Raises:
        RuntimeError: nothing does; the message says what is missing.
    """
    if device.type in _DEVICES:
        return _DEVICES[device.type]
    missing = "there are kernels for the CPU and for CUDA only"
    if device.type == "cuda":
        missing = next(backend.obstacle() for backend in dispatch.BACKENDS if backend.name == "cuda")
        missing = missing or "its CUDA kernels do not serve PyTorch yet"
    raise RuntimeError(f"fastsepconv cannot compute where x is, on {device}: {missing}.")
