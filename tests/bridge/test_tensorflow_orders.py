"""Gradients of gradients, forward mode, Jacobians."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge

from ..tolerances import FINITE_DIFFERENCE, assert_close
from .cases import KINDS, operands, window_of
from .oracle import convolve

WINDOW = {"strides": (2, 1), "padding": "same", "dilation_rate": (1, 2)}
SIZES = (2, 4, 5, 3), (2, 3), 2, 3


def functions(kind):
    window = window_of(kind, WINDOW)
    return lambda *t: KINDS[kind](*t, **window), lambda *t: convolve(kind, t[:-1], t[-1], **window)


def derivative(function, order, weights):
    """A function whose result depends on all derivatives of `function` up to `order`, each weighted at random."""
    if order == 0:
        return lambda *inputs: tf.reduce_sum(tf.sin(function(*inputs)) * weights(0, function(*inputs)))
    lower = derivative(function, order - 1, weights)

    def higher(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = lower(*inputs)
        parts = tape.gradient(value, inputs)
        return tf.add_n([tf.reduce_sum(part**2 * weights(order, part)) for part in parts if part is not None])

    return higher


def weights(order, tensor):
    return tf.constant(np.random.default_rng(order).standard_normal(tensor.shape), tensor.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_orders(rng, kind, order, graph):
    inputs = [tensor * 0.3 for tensor in operands(rng, kind, *SIZES)]
    ours, theirs = (derivative(function, order - 1, weights) for function in functions(kind))

    def gradient(function):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*inputs)
        return tape.gradient(value, inputs)

    mine = tf.function(lambda: gradient(ours))() if graph else gradient(ours)
    for part, expected in zip(mine, gradient(theirs), strict=True):
        assert_close(f"order {order}", part, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_by_finite_differences(rng, kind):
    inputs = operands(rng, kind, *SIZES)
    ours, _ = functions(kind)
    penalty = derivative(ours, 1, weights)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = penalty(*inputs)
    parts = tape.gradient(value, inputs)
    directions = [tf.constant(rng.standard_normal(t.shape)) for t in inputs]
    step = 1e-6
    ahead, behind = (penalty(*(t + s * step * d for t, d in zip(inputs, directions, strict=True))) for s in (1, -1))
    expected = (ahead - behind) / (2 * step)
    actual = tf.add_n([tf.reduce_sum(p * d) for p, d in zip(parts, directions, strict=True)])
    assert abs(actual - expected) <= FINITE_DIFFERENCE * abs(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_inputs(rng, kind):
    """Only what is asked for is computed, whichever inputs that are, in both orders."""
    inputs = operands(rng, kind, *SIZES)
    ours, theirs = functions(kind)
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(len(inputs)), n) for n in (1, 2)):
        results = []
        for function in (ours, theirs):
            with tf.GradientTape() as outer:
                outer.watch([inputs[i] for i in chosen])
                with tf.GradientTape() as inner:
                    inner.watch([inputs[i] for i in chosen])
                    y = tf.reduce_sum(tf.sin(function(*inputs)))
                first = inner.gradient(y, [inputs[i] for i in chosen])
                penalty = tf.add_n([tf.reduce_sum(part**2) for part in first])
            results.append([*first, *outer.gradient(penalty, [inputs[i] for i in chosen])])
        for part, expected in zip(*results, strict=True):
            assert_close(f"inputs {chosen}", part, expected)


def test_v1_gradients_of_unused_outputs(rng):
    """tf.gradients knows no tape, and asks for every gradient."""
    x, depthwise, pointwise, bias = operands(rng, "separable", *SIZES)

    @tf.function
    def second(function):
        (dx,) = tf.gradients(tf.reduce_sum(function(x, depthwise, pointwise, bias) ** 2), [x])
        return tf.gradients(tf.reduce_sum(dx**2), [x, depthwise, pointwise, bias])

    ours, theirs = functions("separable")
    for part, expected in zip(second(ours), second(theirs), strict=True):
        assert_close("gradient", part, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(rng, kind):
    inputs = operands(rng, kind, *SIZES)
    tangents = [tf.constant(rng.standard_normal(t.shape)) for t in inputs]
    results = []
    for function in functions(kind):
        with tf.autodiff.ForwardAccumulator(inputs, tangents) as accumulator:
            y = function(*inputs)
        results.append(accumulator.jvp(y))
    assert_close("jvp", *results)


def test_jacobian_and_vectorized_map_fall_back_to_a_loop(rng):
    x, depthwise, pointwise, bias = operands(rng, "separable", (1, 3, 3, 2), (2, 2), 1, 2)
    results = []
    for function in (bridge.separable_conv2d, lambda *t: convolve("separable", t[:-1], t[-1])):
        with tf.GradientTape() as tape:
            tape.watch(depthwise)
            y = function(x, depthwise, pointwise, bias)
        results.append(tape.jacobian(y, depthwise))
    assert_close("jacobian", *results)
    images = tf.constant(rng.standard_normal((4, 1, 3, 3, 2)))
    mapped = tf.vectorized_map(lambda image: bridge.separable_conv2d(image, depthwise, pointwise, bias), images)
    for image, y in zip(images, mapped, strict=True):
        np.testing.assert_array_equal(y, bridge.separable_conv2d(image, depthwise, pointwise, bias))
