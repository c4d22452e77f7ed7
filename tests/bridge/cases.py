"""The convolutions that the bridge's tests run: kind, sizes, window; and their operands."""

from __future__ import annotations

import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge

KINDS = {
    "separable": bridge.separable_conv2d,
    "depthwise": bridge.depthwise_conv2d,
    "pointwise": bridge.pointwise_conv2d,
}

# (image N,H,W,C), (taps R,S), multiplier, filters, window.
WINDOWS = {
    "plain": ((2, 6, 7, 5), (3, 3), 1, 6, {}),
    "same": ((2, 7, 5, 3), (3, 2), 2, 5, {"padding": "same"}),
    "strides": ((2, 7, 8, 4), (3, 3), 1, 5, {"padding": "same", "strides": (2, 3)}),
    "dilation": ((1, 9, 8, 3), (3, 2), 2, 4, {"strides": (2, 1), "dilation_rate": (2, 3)}),
    "explicit": ((2, 4, 5, 3), (2, 3), 1, 4, {"padding": ((2, 0), (1, 3)), "strides": (1, 2)}),
}


def operands(rng, kind, image, taps, multiplier, filters, dtype="float64"):
    """x, the kernels and the bias of a convolution, as constants."""
    channels = image[-1]
    middle = channels * multiplier if kind == "separable" else channels
    shapes = [image]
    shapes += [(*taps, channels, multiplier)] if kind != "pointwise" else []
    shapes += [(1, 1, middle, filters)] if kind != "depthwise" else []
    shapes += [(filters,) if kind != "depthwise" else (channels * multiplier,)]
    return [tf.constant(rng.standard_normal(shape), dtype) for shape in shapes]


def window_of(kind, window):
    """The arguments that `kind` takes."""
    return {} if kind == "pointwise" else window


def gradients(function, inputs, dy=None):
    """`function`'s result for the inputs, and the gradient of each (for dy, where the result is not a scalar)."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
    return y, tape.gradient(y, inputs, output_gradients=dy)
