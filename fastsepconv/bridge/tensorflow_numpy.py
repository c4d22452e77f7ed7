"""The operations through `tf.numpy_function`: for a TensorFlow whose C API cannot be had, and for other backends.

The same functions as in `tensorflow_ops`, differentiable to any order too, on any module of kernels that has the
functions of `kernels.cpu`. Slower: each call takes the GIL, and a graph that holds one can be neither saved nor sent
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import tensorflow as tf

from ..kernels import cpu
from . import array_calls
from .multilinear import gradient_of_gradient
from .static_shapes import by_name, output_shape, static_shape

Attributes = tuple


def forward(
    kind: str, operands: Sequence[tf.Tensor], bias: tf.Tensor | None, attributes: Attributes, kernels: ModuleType = cpu
) -> tf.Tensor:
    """The operation on channels-last tensors of one dtype, float32 or float64."""
    named = by_name(attributes)
    count = len(operands)
    shapes = [static_shape(operand) for operand in operands]
    shape = output_shape(shapes, None if bias is None else static_shape(bias), named)

    @tf.custom_gradient
    def operation(*inputs):
        y = tf.numpy_function(
            lambda *arrays: _forward(kernels, kind, arrays[:count], arrays[count:], named),
            inputs, inputs[0].dtype, stateful=False,
        )  # fmt: skip
        y.set_shape(shape)

        def gradient(dy):
            gradients = backward(kind, inputs[:count], dy, attributes, [True] * count + [len(inputs) > count], kernels)
            return gradients[: len(inputs)]

        return y, gradient

    return operation(*operands, *([] if bias is None else [bias]))


def backward(
    kind: str,
    operands: Sequence[tf.Tensor],
    dy: tf.Tensor,
    attributes: Attributes,
    wanted: Sequence[bool],
    kernels: ModuleType = cpu,
) -> list[tf.Tensor | None]:
    """The gradients of the operands and of the bias for the output's gradient dy; None for those not wanted."""
    named = by_name(attributes)
    chosen = [i for i, want in enumerate(wanted) if want]

    @tf.custom_gradient
    def operation(*inputs):
        *operands, dy = inputs
        gradients = tf.numpy_function(
            lambda *arrays: _backward(kernels, kind, arrays[:-1], arrays[-1], named, wanted),
            inputs, [dy.dtype] * len(chosen), stateful=False,
        )  # fmt: skip
        gradients = tf.nest.flatten(gradients)  # TensorFlow gives a single one without its list
        for i, part in zip(chosen, gradients, strict=True):
            part.set_shape(operands[i].shape if i < len(operands) else dy.shape[-1:])

        def gradient(*upstream):
            given: list = [None] * len(wanted)
            for i, u in zip(chosen, upstream, strict=True):
                given[i] = tf.broadcast_to(u, tf.shape(dy)) if i == len(operands) else u
            return gradient_of_gradient(
                lambda operands: forward(kind, operands, None, attributes, kernels),
                lambda operands, dy, wanted: backward(kind, operands, dy, attributes, wanted, kernels),
                operands, dy, given, [True] * len(inputs),
            )  # fmt: skip

        return gradients, gradient

    gradients = dict(zip(chosen, tf.nest.flatten(operation(*operands, dy)), strict=True))
    return [gradients.get(i) for i in range(len(wanted))]


def _forward(
    backend: ModuleType, kind: str, arrays: Sequence[np.ndarray], bias: Sequence[np.ndarray], named: dict
) -> np.ndarray:
    arrays = [np.ascontiguousarray(array) for array in arrays]
    added = np.ascontiguousarray(bias[0]) if bias else None
    return array_calls.forward(backend, kind, arrays, added, named, lambda i, shape: np.empty(shape, arrays[0].dtype))


def _backward(
    backend: ModuleType,
    kind: str,
    arrays: Sequence[np.ndarray],
    dy: np.ndarray,
    named: dict,
    wanted: Sequence[bool],
) -> list[np.ndarray]:
    *arrays, dy = (np.ascontiguousarray(array) for array in (*arrays, dy))
    gradients = array_calls.backward(
        backend, kind, arrays, dy, named, wanted, lambda i, shape: np.empty(shape, dy.dtype)
    )
    return [gradient for gradient in gradients if gradient is not None]
