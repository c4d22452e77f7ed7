"""The convolutions that the TensorFlow bridge's tests run, and their operands."""

from __future__ import annotations

import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.bridge import tensorflow_ops

from ..tolerances import RELATIVE, relative_error
from . import oracle
from .windows import WINDOWS, operand_shapes, window_of

__all__ = ["KINDS", "WINDOWS", "add_node", "assert_second_order", "gradients", "operands", "window_of"]

KINDS = {
    "separable": bridge.separable_conv2d,
    "depthwise": bridge.depthwise_conv2d,
    "pointwise": bridge.pointwise_conv2d,
}


def operands(rng, kind, image, taps, multiplier, filters, dtype="float64"):
    """x, the kernels and the bias of a convolution, as constants."""
    shapes = operand_shapes(kind, image, taps, multiplier, filters)
    return [tf.constant(rng.standard_normal(shape), dtype) for shape in shapes]


def gradients(function, inputs, dy=None):
    """`function`'s result for the inputs, and the gradient of each (for dy, where the result is not a scalar)."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
    return y, tape.gradient(y, inputs, output_gradients=dy)


def assert_second_order(kind, rng):
    """The gradients of a convolution's gradients are TensorFlow's, with strides, in float64."""
    *sizes, options = WINDOWS["strides"]
    inputs, options = operands(rng, kind, *sizes)[:-1], window_of(kind, options)
    u = [tf.constant(rng.standard_normal(tensor.shape)) for tensor in inputs]

    def second_order(convolve):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            _, first = gradients(lambda *inputs: convolve(*inputs) ** 2, inputs)
            total = sum(tf.reduce_sum(a * b) for a, b in zip(first, u, strict=True))
        return outer.gradient(total, inputs)

    ours = second_order(lambda *inputs: KINDS[kind](*inputs, **options))
    theirs = second_order(lambda *inputs: oracle.convolve(kind, inputs, **options))
    for our, their in zip(ours, theirs, strict=True):
        assert relative_error(our, their) <= 100 * RELATIVE["float64"]


def add_node(kind: str, *operands, bias=(), residual=(), **attributes):
    """A node of this package's in the present graph, its y."""
    attributes = {"relu": 0} | ({} if kind == "Depthwise" else {"keep": 0}) | attributes
    if kind != "Pointwise":
        attributes |= {"relu_x": 0, "strides": [1, 1], "dilations": [1, 1], "same": 1, "padding": [0] * 4} | attributes
    lists = [list(bias)] if kind == "Depthwise" else [list(bias), list(residual)]
    flat = tuple(part for pair in attributes.items() for part in pair)
    return tensorflow_ops._apply_in_graph(f"Fastsepconv{kind}", [*operands, *lists], flat)[0]
