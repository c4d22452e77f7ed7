"""The TensorFlow functions' outputs and first gradients, whatever the tensors and wherever they run."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import core

from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.bridge import tensorflow_ops
from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import resolve

from ..mappings import advised, wants_huge_pages
from ..tolerances import assert_close
from .cases import KINDS, WINDOWS, gradients, operands, window_of
from .oracle import convolve

CASES = [
    pytest.param(kind, case, id=f"{kind}-{case}")
    for kind in KINDS
    for case in (WINDOWS if kind != "pointwise" else ["plain"])
]


@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_output_and_gradients(rng, kind, case, graph, dtype):
    *sizes, window = WINDOWS[case]
    window = window_of(kind, window)
    inputs = operands(rng, kind, *sizes, dtype)
    exact = [tf.cast(tensor, tf.float64) for tensor in inputs]
    true_y, _ = gradients(lambda *t: convolve(kind, t[:-1], t[-1], **window), exact)
    dy = tf.constant(rng.standard_normal(true_y.shape), dtype)
    _, true_gradients = gradients(lambda *t: convolve(kind, t[:-1], t[-1], **window), exact, tf.cast(dy, tf.float64))

    def ours(*tensors):
        return gradients(lambda *t: KINDS[kind](*t, **window), list(tensors), dy)

    y, ours_gradients = (tf.function(ours) if graph else ours)(*inputs)
    assert_close("y", y, true_y)
    for name, gradient, true_gradient in zip("x abc", ours_gradients, true_gradients, strict=False):
        assert_close(name, gradient, true_gradient)
    assert len(ours_gradients) == len(inputs)


def test_without_bias(rng):
    *inputs, _ = operands(rng, "separable", *WINDOWS["same"][:-1])
    y, ours = gradients(lambda *t: bridge.separable_conv2d(*t, padding="same"), inputs)
    true_y, true_gradients = gradients(lambda *t: convolve("separable", t, padding="same"), inputs)
    assert_close("y", y, true_y)
    for gradient, true_gradient in zip(ours, true_gradients, strict=True):
        assert_close("gradient", gradient, true_gradient)


def test_equals_the_reference(rng):
    x, depthwise, pointwise, bias = operands(rng, "separable", (2, 7, 6, 3), (3, 3), 2, 5)
    g = resolve(tuple(x.shape), tuple(depthwise.shape), (2, 2), "same", (1, 1))
    dy = rng.standard_normal((2, 4, 3, 5))
    arrays = [tensor.numpy() for tensor in (x, depthwise, pointwise)]
    arrays[2] = arrays[2].reshape(6, 5)
    y, ours = gradients(
        lambda *t: bridge.separable_conv2d(*t, strides=2, padding="same"),
        [x, depthwise, pointwise, bias],
        tf.constant(dy),
    )
    assert_close("y", y, reference.separable_forward(g, *arrays, bias.numpy()))
    for gradient, true_gradient in zip(ours, reference.separable_backward(g, *arrays, dy), strict=True):
        assert_close("gradient", gradient, true_gradient.reshape(gradient.shape))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_order_pointwise_first(rng, data_format):
    x = rng.standard_normal((2, 6, 7, 4))
    pointwise, depthwise, bias = (rng.standard_normal(shape) for shape in ((1, 1, 4, 3), (3, 3, 3, 2), (6,)))
    expected = tf.nn.depthwise_conv2d(tf.nn.conv2d(x, pointwise, 1, "SAME"), depthwise, (1, 1, 1, 1), "SAME") + bias
    first = data_format == "channels_first"
    y = bridge.separable_conv2d(
        tf.transpose(x, (0, 3, 1, 2)) if first else x, depthwise, pointwise, bias,
        padding="same", data_format=data_format, order="pointwise_depthwise",
    )  # fmt: skip
    assert_close("y", tf.transpose(y, (0, 2, 3, 1)) if first else y, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_first(rng, kind):
    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 3), 1, 6)
    inputs[0] = tf.transpose(inputs[0], (0, 3, 1, 2))

    def ours(*t):
        return KINDS[kind](*t, data_format="channels_first")

    def theirs(x, *others):
        y = convolve(kind, [tf.transpose(x, (0, 2, 3, 1)), *others[:-1]], others[-1])
        return tf.transpose(y, (0, 3, 1, 2))

    for function in (ours, tf.function(ours)):
        y, ours_gradients = gradients(function, inputs)
        true_y, true_gradients = gradients(theirs, inputs)
        assert_close("y", y, true_y)
        for gradient, true_gradient in zip(ours_gradients, true_gradients, strict=True):
            assert_close("gradient", gradient, true_gradient)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_compute_in_float32(rng, dtype):
    inputs = operands(rng, "separable", (2, 6, 7, 5), (3, 3), 1, 6, dtype)
    exact = [tf.cast(tensor, tf.float64) for tensor in inputs]
    y, ours = gradients(bridge.separable_conv2d, inputs)
    true_y, true_gradients = gradients(lambda *t: convolve("separable", t[:-1], t[-1]), exact)
    for ours_tensor, true_tensor in zip([y, *ours], [true_y, *true_gradients], strict=True):
        assert ours_tensor.dtype == dtype
        assert_close("tensor", ours_tensor.numpy(), true_tensor)


def test_takes_variables_arrays_and_keras_variables(rng):
    x, depthwise, pointwise, bias = (
        t.numpy() for t in operands(rng, "separable", (1, 5, 5, 2), (3, 3), 1, 3, "float32")
    )
    expected = bridge.separable_conv2d(x, depthwise, pointwise, bias)
    variables = tf.Variable(depthwise), keras.Variable(pointwise), tf.Variable(bias)
    with tf.GradientTape() as tape:
        y = bridge.separable_conv2d(x, *variables)
    np.testing.assert_array_equal(y, expected)
    d_depthwise, d_pointwise, d_bias = tape.gradient(y, [variables[0], variables[1].value, variables[2]])
    assert d_depthwise.shape == (3, 3, 2, 1) and d_pointwise.shape == (1, 1, 2, 3)
    np.testing.assert_array_equal(d_bias, [9.0, 9.0, 9.0])
    np.testing.assert_array_equal(bridge.pointwise_conv2d(x, [[1.0, 0.0], [0.0, 1.0]]), x)


def test_pointwise_kernel_of_two_dimensions_has_a_gradient_of_two(rng):
    x, depthwise, pointwise, bias = operands(rng, "separable", (1, 5, 5, 2), (3, 3), 2, 3)
    y, (gradient,) = gradients(lambda k: bridge.separable_conv2d(x, depthwise, k, bias), [pointwise[0, 0]])
    expected_y, (expected,) = gradients(lambda k: bridge.separable_conv2d(x, depthwise, k, bias), [pointwise])
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(gradient, expected[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(rng, kind):
    inputs = operands(rng, kind, (0, 5, 6, 3), (3, 3), 1, 4, "float32")
    for function in (KINDS[kind], tf.function(KINDS[kind])):
        y, (dx, *others) = gradients(function, inputs)
        assert y.shape[0] == 0 and y.shape[-1] == inputs[-1].shape[0]
        assert dx.shape == (0, 5, 6, 3)
        for gradient in others:
            np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_empty_output(rng):
    """A kernel one pixel too large for the image gives no pixels."""
    x, kernel, _ = operands(rng, "depthwise", (2, 2, 5, 3), (3, 3), 1, 0, "float32")
    y, (dx, d_kernel) = gradients(bridge.depthwise_conv2d, [x, kernel])
    assert y.shape == (2, 0, 3, 3)
    np.testing.assert_array_equal(dx, np.zeros(x.shape))
    np.testing.assert_array_equal(d_kernel, np.zeros(kernel.shape))


def test_nan_and_infinity_travel(rng):
    x, depthwise, pointwise, bias = operands(rng, "separable", (1, 6, 6, 2), (3, 3), 1, 3, "float32")
    x = tf.tensor_scatter_nd_update(x, [[0, 0, 0, 0], [0, 5, 5, 1]], [np.nan, np.inf])
    y = bridge.separable_conv2d(x, depthwise, pointwise, bias)
    expected = tf.nn.separable_conv2d(x, depthwise, pointwise, (1, 1, 1, 1), "VALID") + bias
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))


def test_unaligned_input(rng):
    """A slice along the batch starts at any address."""
    x = tf.constant(rng.standard_normal((3, 5, 5, 3)), tf.float32)
    kernel = tf.constant(rng.standard_normal((3, 3, 3, 1)), tf.float32)
    whole = bridge.depthwise_conv2d(x, kernel)
    parts = tf.function(lambda x: [bridge.depthwise_conv2d(part, kernel) for part in tf.split(x, 3)])(x)
    np.testing.assert_array_equal(tf.concat(parts, 0), whole)


def test_same_gradients_whatever_the_thread_count(rng):
    from fastsepconv.kernels.cpu import threads

    inputs = operands(rng, "separable", (3, 12, 11, 24), (3, 3), 1, 40, "float32")
    count = threads.get_num_threads()
    try:
        results = []
        for n in (1, count):
            threads.set_num_threads(n)
            y, parts = gradients(bridge.separable_conv2d, inputs)
            results.append([y, *parts])
    finally:
        threads.set_num_threads(count)
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_fast_path_declines(rng, monkeypatch, kind):
    *inputs, bias = operands(rng, kind, (2, 6, 7, 5), (3, 3), 1, 6)
    expected = gradients(KINDS[kind], [*inputs, bias]), gradients(KINDS[kind], inputs)

    def decline(*_):
        raise core._FallbackException

    for arguments, (y, parts) in zip(([*inputs, bias], inputs), expected, strict=True):
        with tf.GradientTape() as tape, monkeypatch.context() as patch:
            patch.setattr(tensorflow_ops.pywrap_tfe, "TFE_Py_FastPathExecute", decline)
            tape.watch(arguments)
            slow_y = KINDS[kind](*arguments)
        for ours, right in zip([slow_y, *tape.gradient(slow_y, arguments)], [y, *parts], strict=True):
            np.testing.assert_array_equal(ours, right)


@wants_huge_pages
def test_large_results_come_in_large_pages():
    x, kernel = tf.zeros((1, 400, 400, 64)), tf.zeros((1, 1, 64, 1))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = bridge.depthwise_conv2d(x, kernel)
    for result in (y, tape.gradient(y, x)):
        shared = np.asarray(memoryview(result))
        assert advised(shared.ctypes.data + shared.nbytes // 2)
