"""AMX's registers serve TensorFlow's own products of bfloat16 as well, in the same thread, with another layout."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.kernels.cpu import tiles

pytestmark = pytest.mark.skipif(not tiles.CHOSEN.matrices, reason="needs a CPU with AMX, and a system that allows it")


def test_products_of_both_take_turns(rng):
    a, b, c = (tf.cast(rng.standard_normal(shape), tf.bfloat16) for shape in ((250, 256), (256, 520), (520, 64)))
    shapes = (1, 19, 19, 64), (3, 3, 64, 1), (1, 1, 64, 96)
    x, depthwise, pointwise = (tf.constant(rng.standard_normal(shape), tf.float32) for shape in shapes)

    @tf.function
    def both():
        before = tf.matmul(tf.matmul(a, b), c)
        ours = bridge.separable_conv2d(x, depthwise, pointwise, padding="same")
        with tf.control_dependencies([ours]):
            after = tf.matmul(tf.matmul(a, b), c)
        return before, ours, after

    matrix, convolved, _ = (result.numpy() for result in both())
    exact = a.numpy().astype(np.float64) @ b.numpy().astype(np.float64) @ c.numpy().astype(np.float64)
    np.testing.assert_allclose(matrix.astype(np.float64), exact, atol=0.02 * np.abs(exact).max())
    stock = tf.nn.separable_conv2d(x, depthwise, pointwise, (1, 1, 1, 1), "SAME").numpy()
    np.testing.assert_allclose(convolved, stock, atol=1e-5 * np.abs(stock).max())
    for _ in range(50):
        before, ours, after = (result.numpy() for result in both())
        np.testing.assert_array_equal(before, matrix)
        np.testing.assert_array_equal(after, matrix)
        np.testing.assert_array_equal(ours, convolved)
