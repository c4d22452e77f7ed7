"""Activations: every element-wise name of keras.activations to within rounding, and callables."""

from __future__ import annotations

import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv import activations

from .tolerances import ACTIVATION_UNITS, ROUNDING_UNIT

# TensorFlow rounds the constant of these to float32 even where the tensor is float64; here it is exact.
ROUNDED_BY_TENSORFLOW = {"gelu", "leaky_relu"}
# These look at more than one value, or (threshold) have arguments without a default.
NOT_ELEMENT_WISE = {"softmax", "log_softmax", "sparsemax", "glu", "threshold"}
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 88.8, -88.8, -104.0, 3e38, -3e38]
EDGES = [edge + offset for edge in (-3, -1, -0.5, 0.5, 1, 3, 6) for offset in (-1e-3, 0, 1e-3)]


def keras_names() -> set[str]:
    skipped = {"get", "serialize", "deserialize"}
    return {name for name in dir(keras.activations) if name[0] != "_" and name not in skipped}


def test_every_element_wise_name_of_keras_is_here():
    assert keras_names() - NOT_ELEMENT_WISE <= set(activations.NAMES)
    assert len(activations.NAMES) == 27


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(keras_names() - NOT_ELEMENT_WISE))
def test_values_are_keras(backend, name, dtype):
    values = np.concatenate([np.linspace(-12, 12, 2001), np.geomspace(1e-6, 50, 200), EDGES, SPECIAL]).astype(dtype)
    expected = keras.activations.get(name)(tf.constant(values)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = np.ones((1, 1), dtype)
        ours = fastsepconv.pointwise_conv2d(values.reshape(1, 1, -1, 1), one, activation=name, backend=backend).ravel()
    assert ours.dtype == dtype
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(ours[~finite], expected[~finite])
    ours, expected, values = (array[finite].astype("float64") for array in (ours, expected, values))
    unit = ROUNDING_UNIT["float32" if name in ROUNDED_BY_TENSORFLOW else dtype]
    scale = np.where(np.isfinite(values), np.abs(values), 1)
    allowed = ACTIVATION_UNITS * unit * np.maximum.reduce([np.ones_like(scale), scale, np.abs(expected)])
    worst = np.argmax(np.abs(ours - expected) / allowed)
    assert (np.abs(ours - expected) <= allowed).all(), (values[worst], ours[worst], expected[worst])


def test_gelu_and_leaky_relu_are_exact_in_float64():
    values = np.linspace(-9, 9, 1001)
    exact = [0.5 * x * math.erfc(-x * math.sqrt(0.5)) for x in values]
    np.testing.assert_allclose(activations.gelu(values), exact, rtol=1e-12)
    np.testing.assert_array_equal(activations.leaky_relu(values), np.where(values > 0, values, 0.2 * values))


@pytest.mark.parametrize("name", activations.CLAMPS)
def test_what_only_cuts_off_is_left_to_the_kernel(name):
    assert activations.get(name).function is None


@pytest.mark.parametrize("name", [None, "linear"])
def test_no_activation_is_linear(rng, backend, name):
    x, kernel = rng.normal(size=(1, 2, 3, 4)), rng.normal(size=(4, 2))
    y = fastsepconv.pointwise_conv2d(x, kernel, activation=name, backend=backend)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-13)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_callable_gets_the_output_in_the_callers_format(rng, backend, data_format):
    x, kernel = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5 if data_format == "channels_last" else 3, 6))
    seen = []

    def softmax_over_rows(y):
        seen.append(y.shape)
        powers = np.exp(y)
        return powers / powers.sum(2, keepdims=True)

    options = {"data_format": data_format, "backend": backend}
    plain = fastsepconv.pointwise_conv2d(x, kernel, **options)
    y = fastsepconv.pointwise_conv2d(x, kernel, activation=softmax_over_rows, **options)
    assert seen == [plain.shape]
    np.testing.assert_allclose(y, softmax_over_rows(plain), rtol=1e-14)


def test_a_callable_may_be_keras_own(rng, backend):
    x, kernel = rng.normal(size=(2, 3, 4, 5)).astype("float16"), rng.normal(size=(5, 6)).astype("float16")
    y = fastsepconv.pointwise_conv2d(x, kernel, activation=keras.activations.softplus, backend=backend)
    assert y.dtype == "float16"
    np.testing.assert_array_equal(y, fastsepconv.pointwise_conv2d(x, kernel, activation="softplus", backend=backend))


@pytest.mark.parametrize("out", [False, True])
def test_a_callable_may_work_in_place_or_give_other_numbers(rng, backend, out):
    x, kernel = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5, 6))
    plain = fastsepconv.pointwise_conv2d(x, kernel, backend=backend)
    out = np.full_like(plain, np.nan) if out else None

    def double(y):
        y *= 2
        return y

    options = {"backend": backend, "out": out}
    y = fastsepconv.pointwise_conv2d(x, kernel, activation=double, **options)
    np.testing.assert_array_equal(y, 2 * plain)
    y = fastsepconv.pointwise_conv2d(x, kernel, activation=lambda y: y[:, ::-1], **options)
    np.testing.assert_array_equal(y, plain[:, ::-1])
    y = fastsepconv.pointwise_conv2d(x, kernel, activation=lambda y: y > 0, **options)
    assert y.dtype == "float64"
    np.testing.assert_array_equal(y, plain > 0)


@pytest.mark.parametrize("name", [*sorted(NOT_ELEMENT_WISE), "Relu", "", 5, ("relu",)])
def test_other_names_are_refused(name):
    with pytest.raises(
        ValueError, match=r"Invalid value for argument `activation`\. Expected None, a function .* relu6"
    ):
        fastsepconv.pointwise_conv2d(np.ones((1, 1, 1, 1)), np.ones((1, 1)), activation=name)


@pytest.mark.parametrize(
    "function, error",
    [(lambda y: y.sum(), ValueError), (lambda y: None, ValueError), (lambda y: y + 1j, TypeError)],
)
def test_a_callable_that_gives_something_else_is_refused(function, error):
    with pytest.raises(error, match="Invalid value for argument `activation`"):
        fastsepconv.pointwise_conv2d(np.ones((1, 1, 2, 1)), np.ones((1, 1)), activation=function)
