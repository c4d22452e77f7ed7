"""What Keras on TensorFlow makes of the same arrays: outputs and gradients."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf


def by_keras(
    arrays: dict[str, np.ndarray],
    dy: np.ndarray,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    data_format="channels_last",
    order="depthwise_pointwise",
) -> list[np.ndarray]:
    """`[y, dx, the gradient of every other array]`; the steps whose kernels are among the arrays are taken in order.

    Explicit padding is laid around the image by `tf.pad`. Channels-first images are transposed, as TensorFlow's CPU
    kernels want them.
    """
    first = data_format == "channels_first"
    tensors = {name: tf.constant(array) for name, array in arrays.items()}
    with tf.GradientTape() as tape:
        tape.watch(list(tensors.values()))
        y = tf.transpose(tensors["x"], (0, 2, 3, 1)) if first else tensors["x"]
        for step in order.split("_"):
            kernel = tensors.get(f"{step}_kernel")
            if kernel is None:
                continue
            if step == "pointwise":
                y = keras.ops.conv(y, tf.reshape(kernel, (1, 1, *kernel.shape[-2:])))
            else:
                if not isinstance(padding, str):
                    y, padding = tf.pad(y, [(0, 0), *padding, (0, 0)]), "valid"
                y = _depthwise(y, kernel, strides, padding, dilation_rate)
        if "bias" in tensors:
            y = y + tensors["bias"]
        y = tf.transpose(y, (0, 3, 1, 2)) if first else y
    gradients = tape.gradient(y, list(tensors.values()), output_gradients=tf.constant(dy, y.dtype))
    return [y.numpy(), *(gradient.numpy() for gradient in gradients)]


def _depthwise(x, kernel, strides, padding, dilation_rate):
    """Keras's depthwise convolution.

    TensorFlow takes strides that differ in float32 on CPUs with AVX-512 alone. Otherwise the output of stride 1 is
    thinned out, the image padded as the stride demands.
    """
    rows, columns = (strides, strides) if isinstance(strides, int) else strides
    try:
        return keras.ops.depthwise_conv(x, kernel, strides, padding, dilation_rate=dilation_rate)
    except tf.errors.InvalidArgumentError:
        if rows == columns:
            raise
    if padding == "same":
        x = tf.pad(x, [(0, 0), *map(_same, x.shape[1:3], kernel.shape[:2], (rows, columns)), (0, 0)])
    return keras.ops.depthwise_conv(x, kernel, 1, "valid", dilation_rate=dilation_rate)[:, ::rows, ::columns]


def _same(size: int, taps: int, stride: int) -> tuple[int, int]:
    """How much padding "same" means before and after, without dilation."""
    total = max(0, (-(-size // stride) - 1) * stride + taps - size)
    return total // 2, total - total // 2
