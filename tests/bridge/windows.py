"""The convolutions that the bridges' tests run: sizes and windows, of no framework."""

from __future__ import annotations

# (image N,H,W,C), (taps R,S), multiplier, filters, window.
WINDOWS = {
    "plain": ((2, 6, 7, 5), (3, 3), 1, 6, {}),
    "same": ((2, 7, 5, 3), (3, 2), 2, 5, {"padding": "same"}),
    "strides": ((2, 7, 8, 4), (3, 3), 1, 5, {"padding": "same", "strides": (2, 3)}),
    "dilation": ((1, 9, 8, 3), (3, 2), 2, 4, {"strides": (2, 1), "dilation_rate": (2, 3)}),
    "explicit": ((2, 4, 5, 3), (2, 3), 1, 4, {"padding": ((2, 0), (1, 3)), "strides": (1, 2)}),
}


def operand_shapes(kind, image, taps, multiplier, filters):
    """The shapes of x, the kernels and the bias of a convolution."""
    channels = image[-1]
    middle = channels * multiplier if kind == "separable" else channels
    shapes = [image]
    shapes += [(*taps, channels, multiplier)] if kind != "pointwise" else []
    shapes += [(1, 1, middle, filters)] if kind != "depthwise" else []
    return [*shapes, (filters,) if kind != "depthwise" else (channels * multiplier,)]


def window_of(kind, window):
    """The arguments that `kind` takes."""
    return {} if kind == "pointwise" else window
