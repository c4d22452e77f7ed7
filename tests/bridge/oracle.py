"""The same operations from TensorFlow's own slices and sums: slow, differentiable to any order, any window."""

from __future__ import annotations

import tensorflow as tf

from fastsepconv.kernels.geometry import resolve


def convolve(kind, operands, bias=None, strides=(1, 1), padding="valid", dilation_rate=(1, 1)):
    """`kind` is "separable", "depthwise" or "pointwise"; the operands are x and the kernels, tensors of one dtype."""
    y, *kernels = operands
    if kind != "pointwise":
        y = _depthwise(y, kernels[0], strides, padding, dilation_rate)
    if kind != "depthwise":
        y = tf.einsum("nhwk,kf->nhwf", y, tf.reshape(kernels[-1], kernels[-1].shape[-2:]))
    return y if bias is None else y + bias


def _depthwise(x, kernel, strides, padding, dilation_rate):
    g = resolve(tuple(x.shape), tuple(kernel.shape), strides, padding, dilation_rate)
    bottom = max(
        0, (g.out_height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1 - g.height - g.pad_top
    )
    right = max(
        0, (g.out_width - 1) * g.stride_width + (g.kernel_width - 1) * g.dilation_width + 1 - g.width - g.pad_left
    )
    x = tf.pad(x, [(0, 0), (g.pad_top, bottom), (g.pad_left, right), (0, 0)])
    y = 0
    for r in range(g.kernel_height):
        h = r * g.dilation_height
        for s in range(g.kernel_width):
            w = s * g.dilation_width
            rows = slice(h, h + (g.out_height - 1) * g.stride_height + 1, g.stride_height)
            columns = slice(w, w + (g.out_width - 1) * g.stride_width + 1, g.stride_width)
            y += x[:, rows, columns, :, None] * kernel[r, s]
    return tf.reshape(y, g.output_shape)
