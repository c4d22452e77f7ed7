"""The specification and its shape arithmetic against TensorFlow, a naive loop, and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import resolve

from ..tolerances import FINITE_DIFFERENCE, assert_close

PADDINGS = ["valid", "same", ((0, 0), (0, 0)), ((2, 1), (0, 3)), ((0, 5), (4, 0))]


def naive_depthwise(x, kernel, strides, padding, dilation):
    """The formula, one product at a time, over an image with its zeros really around it."""
    (_, height, width, channels), (taps_h, taps_w, _, multiplier) = x.shape, kernel.shape
    spans = [(taps - 1) * rate + 1 for taps, rate in zip((taps_h, taps_w), dilation, strict=True)]
    if padding == "same":
        totals = [
            max(0, (-(-size // stride) - 1) * stride + span - size)
            for size, stride, span in zip((height, width), strides, spans, strict=True)
        ]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif padding == "valid":
        padding = ((0, 0), (0, 0))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    rows = range(0, padded.shape[1] - spans[0] + 1, strides[0])
    columns = range(0, padded.shape[2] - spans[1] + 1, strides[1])
    y = np.zeros((len(x), len(rows), len(columns), channels * multiplier))
    for (p, h), (q, w), r, s in itertools.product(enumerate(rows), enumerate(columns), range(taps_h), range(taps_w)):
        pixel = padded[:, h + r * dilation[0], w + s * dilation[1], :, None]
        y[:, p, q] += (pixel * kernel[r, s]).reshape(len(x), -1)
    return y


def close(name, ours, exact):
    assert_close(name, np.asarray(ours), np.asarray(exact))


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3), (4, 2)], ids=str)
def test_depthwise_forward_is_the_naive_loop(rng, strides, dilation, padding):
    for height, width, taps_h, taps_w, multiplier in [(7, 8, 3, 2, 1), (5, 9, 1, 3, 2), (4, 4, 2, 2, 1)]:
        x, kernel = rng.normal(size=(2, height, width, 3)), rng.normal(size=(taps_h, taps_w, 3, multiplier))
        g = resolve(x.shape, kernel.shape, strides, padding, dilation)
        if min(g.output_shape) == 0:
            assert padding in ("valid", ((0, 0), (0, 0)))
            continue
        expected = naive_depthwise(x, kernel, strides, padding, dilation)
        assert g.output_shape == expected.shape
        close("y", reference.depthwise_forward(g, x, kernel), expected)


@pytest.mark.parametrize("padding", ["valid", "same", ((2, 1), (0, 3))], ids=str)
@pytest.mark.parametrize("strides, dilation", [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((3, 3), (1, 1)), ((1, 1), (2, 3))])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_is_tensorflows(rng, strides, dilation, padding, multiplier):
    x, kernel = rng.normal(size=(2, 8, 9, 4)), rng.normal(size=(3, 2, 4, multiplier))
    g = resolve(x.shape, kernel.shape, strides, padding, dilation)
    dy = rng.normal(size=g.output_shape)
    explicit = not isinstance(padding, str)
    tensors = tf.constant(x), tf.constant(kernel)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        padded = tf.pad(tensors[0], [(0, 0), *padding, (0, 0)]) if explicit else tensors[0]
        name = "VALID" if explicit else padding.upper()
        y = tf.nn.depthwise_conv2d(padded, tensors[1], (1, *strides, 1), name, dilations=dilation)
    dx, d_kernel = tape.gradient(y, tensors, output_gradients=tf.constant(dy))
    close("y", reference.depthwise_forward(g, x, kernel), y)
    ours = reference.depthwise_backward(g, x, kernel, dy)
    for label, our, expected in zip(("dx", "d_kernel", "d_bias"), ours, (dx, d_kernel, dy.sum((0, 1, 2))), strict=True):
        close(label, our, expected)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("stride", [1, 2])
def test_separable_is_tensorflows(rng, stride, padding):
    x, bias = rng.normal(size=(2, 7, 6, 3)), rng.normal(size=5)
    depthwise, pointwise = rng.normal(size=(3, 3, 3, 2)), rng.normal(size=(6, 5))
    g = resolve(x.shape, depthwise.shape, (stride, stride), padding, (1, 1))
    dy = rng.normal(size=(2, g.out_height, g.out_width, 5))
    tensors = tuple(map(tf.constant, (x, depthwise, pointwise, bias)))
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        matrix = tensors[2][None, None]
        y = tf.nn.separable_conv2d(tensors[0], tensors[1], matrix, (1, stride, stride, 1), padding.upper()) + tensors[3]
    expected = tape.gradient(y, tensors, output_gradients=tf.constant(dy))
    close("y", reference.separable_forward(g, x, depthwise, pointwise, bias), y)
    ours = reference.separable_backward(g, x, depthwise, pointwise, dy)
    for label, our, their in zip(("dx", "d_depthwise", "d_pointwise", "d_bias"), ours, expected, strict=True):
        close(label, our, their)


@pytest.mark.parametrize("strides, dilation, padding", [((2, 1), (1, 2), "same"), ((1, 3), (2, 2), ((1, 0), (3, 2)))])
def test_gradients_are_the_finite_differences(rng, strides, dilation, padding):
    arguments = {
        "dx": rng.normal(size=(2, 5, 6, 2)),
        "d_depthwise": rng.normal(size=(2, 3, 2, 2)),
        "d_pointwise": rng.normal(size=(4, 3)),
        "d_bias": rng.normal(size=3),
    }
    x, depthwise, pointwise, _ = arguments.values()
    g = resolve(x.shape, depthwise.shape, strides, padding, dilation)
    dy = rng.normal(size=(2, g.out_height, g.out_width, 3))
    gradients = reference.separable_backward(g, x, depthwise, pointwise, dy)
    step = 1e-5
    for (name, value), gradient in zip(arguments.items(), gradients, strict=True):
        assert gradient.shape == value.shape
        for index in np.ndindex(value.shape):
            sides = []
            for side in (step, -step):
                moved = value.copy()
                moved[index] += side
                y = reference.separable_forward(g, *(arguments | {name: moved}).values())
                sides.append((y * dy).sum())
            slope = (sides[0] - sides[1]) / (2 * step)
            assert abs(gradient[index] - slope) <= FINITE_DIFFERENCE * np.abs(gradient).max(), (name, index)


def test_an_empty_batch_has_gradients_of_zero():
    x, depthwise, pointwise = np.zeros((0, 5, 5, 2)), np.ones((3, 3, 2, 1)), np.ones((2, 4))
    g = resolve(x.shape, depthwise.shape, (1, 1), "same", (1, 1))
    assert reference.separable_forward(g, x, depthwise, pointwise).shape == (0, 5, 5, 4)
    dx, *weights = reference.separable_backward(g, x, depthwise, pointwise, np.zeros((0, 5, 5, 4)))
    assert dx.shape == x.shape
    assert [w.shape for w in weights] == [(3, 3, 2, 1), (2, 4), (4,)]
    assert not any(w.any() for w in weights)


def test_a_tap_outside_the_image_contributes_nothing_even_where_the_weight_is_infinite():
    x, kernel = np.ones((1, 3, 3, 1), np.float32), np.ones((3, 3, 1, 1), np.float32)
    kernel[0, 0] = np.inf
    g = resolve(x.shape, kernel.shape, (1, 1), "same", (1, 1))
    y = reference.depthwise_forward(g, x, kernel)[0, :, :, 0]
    np.testing.assert_array_equal(y, [[4, 6, 4], [6, np.inf, np.inf], [4, np.inf, np.inf]])
    theirs = tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "SAME").numpy()[0, :, :, 0]
    agrees = ~np.isnan(theirs)  # TensorFlow's code for CPUs without AVX-512 multiplies padding: 0 * inf is NaN there
    assert agrees[1:, 1:].all()
    np.testing.assert_array_equal(y[agrees], theirs[agrees])
