"""The convolutions that the TensorFlow bridge's tests run, and their operands."""

from __future__ import annotations

import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge

from .windows import WINDOWS, operand_shapes, window_of

__all__ = ["KINDS", "WINDOWS", "gradients", "operands", "window_of"]

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
