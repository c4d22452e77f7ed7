"""The array API beside Keras: every operation, outputs and all gradients."""

from __future__ import annotations

import numpy as np
import pytest

import fastsepconv

from .peers import by_keras
from .tolerances import assert_close, assert_no_worse

# (image N,H,W,C), (taps R,S), multiplier, filters, options. Ragged on purpose.
CASES = {
    "plain": ((2, 7, 9, 5), (3, 3), 1, 6, {}),
    "same": ((2, 7, 9, 5), (3, 3), 2, 6, {"padding": "same"}),
    "even taps": ((1, 8, 6, 3), (2, 4), 1, 1, {"padding": "same"}),
    "stride 2": ((3, 8, 9, 4), (3, 3), 1, 7, {"padding": "same", "strides": 2}),
    "stride beyond kernel": ((2, 10, 11, 3), (2, 2), 3, 4, {"strides": 3}),
    "dilation": ((2, 9, 8, 4), (3, 2), 1, 5, {"padding": "same", "dilation_rate": (2, 3)}),
    "strides and dilation": ((2, 9, 12, 4), (3, 3), 2, 5, {"padding": "same", "strides": (2, 2), "dilation_rate": 2}),
    "explicit padding": ((2, 5, 6, 4), (3, 3), 1, 5, {"padding": ((2, 1), (0, 3)), "strides": 2}),
    "padding beyond kernel": ((1, 3, 3, 2), (2, 2), 1, 3, {"padding": ((4, 0), (0, 5))}),
    "kernel beyond image": ((2, 3, 2, 3), (5, 5), 1, 4, {"padding": "same"}),
    "one pixel": ((4, 1, 1, 9), (1, 1), 1, 8, {}),
    "one channel": ((2, 6, 6, 1), (3, 3), 1, 3, {"padding": "same"}),
    "many channels": ((1, 3, 3, 130), (3, 3), 1, 67, {"padding": "same"}),
    "channels first": ((2, 7, 6, 5), (3, 3), 2, 4, {"padding": "same", "strides": 2, "data_format": "channels_first"}),
}
UNEQUAL_STRIDES = {"unequal strides": ((2, 7, 9, 5), (3, 3), 2, 6, {"padding": "same", "strides": (1, 2)})}


def make(rng, case, operation, dtype, order="depthwise_pointwise"):
    """The arrays of a case, x and bias included, and its options."""
    (n, h, w, c), taps, multiplier, filters, options = case
    x = rng.normal(size=(n, c, h, w) if "data_format" in options else (n, h, w, c))
    pointwise_first = order == "pointwise_depthwise"
    arrays = {"x": x}
    if operation != "pointwise":
        arrays["depthwise_kernel"] = rng.normal(size=(*taps, filters if pointwise_first else c, multiplier))
    if operation == "pointwise":
        multiplier, options = 1, {k: v for k, v in options.items() if k == "data_format"}
    if operation != "depthwise":
        arrays["pointwise_kernel"] = rng.normal(size=(1, 1, c if pointwise_first else c * multiplier, filters))
    outputs = c * multiplier if operation == "depthwise" else filters * multiplier if pointwise_first else filters
    arrays["bias"] = rng.normal(size=outputs)
    return {name: array.astype(dtype) for name, array in arrays.items()}, dict(options)


def run(operation, arrays, dy, backend, **options):
    """`[y, dx, the other gradients]` by fastsepconv; y is written over NaN."""
    function = getattr(fastsepconv, f"{operation}_conv2d")
    out = np.full(dy.shape, np.nan, dy.dtype)
    y = function(*arrays.values(), backend=backend, out=out, **options)
    assert y is out
    weights = [array for name, array in arrays.items() if name != "bias"]
    gradient = getattr(fastsepconv, f"{operation}_conv2d_grad")
    return [y, *gradient(*weights, dy, backend=backend, **options)]


def check(operation, arrays, options, rng, backend):
    forward = getattr(fastsepconv, f"{operation}_conv2d")
    doubles = {name: array.astype("float64") for name, array in arrays.items()}
    shape = forward(*doubles.values(), backend="reference", **options).shape
    dy = rng.normal(size=shape).astype(arrays["x"].dtype)
    exact = run(operation, doubles, dy.astype("float64"), "reference", **options)
    theirs = by_keras(arrays, dy, **options)
    ours = run(operation, arrays, dy, backend, **options)
    for name, our, their, truth in zip(["y", *(f"d_{name}" for name in arrays)], ours, theirs, exact, strict=True):
        assert our.dtype == arrays["x"].dtype
        assert_close(f"Keras's {name}", their, truth)
        assert_close(name, our, truth)
    return ours, theirs, exact


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operation", ["separable", "depthwise", "pointwise"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_keras(rng, backend, case, operation, dtype):
    arrays, options = make(rng, case, operation, dtype)
    check(operation, arrays, options, rng, backend)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operation", ["separable", "depthwise"])
def test_unequal_strides_are_keras(rng, backend, operation, dtype):
    arrays, options = make(rng, UNEQUAL_STRIDES["unequal strides"], operation, dtype)
    check(operation, arrays, options, rng, backend)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_pointwise_first_is_the_two_keras_layers_in_that_order(rng, backend, case, dtype):
    arrays, options = make(rng, case, "separable", dtype, order="pointwise_depthwise")
    check("separable", arrays, options | {"order": "pointwise_depthwise"}, rng, backend)


@pytest.mark.parametrize("operation", ["separable", "depthwise", "pointwise"])
def test_errors_are_of_the_size_of_tensorflows(rng, operation):
    runs = [check(operation, *make(rng, case, operation, "float32"), rng, "cpu") for case in CASES.values()]
    assert_no_worse(*zip(*runs, strict=True))


# Depthwise taps are few; what grows long is the sum over channels in y, and over pixels in d_pointwise.
@pytest.mark.parametrize("pixels, channels", [(64, 728), (64, 2048), (361, 16), (361, 728), (23104, 16)])
def test_errors_of_long_sums_are_of_the_size_of_tensorflows(rng, pixels, channels):
    runs = []
    for _ in range(3):
        case = ((1, pixels // 8 or 1, 8, channels), (1, 1), 1, 16, {})
        runs.append(check("pointwise", *make(rng, case, "pointwise", "float32"), rng, "cpu"))
    assert_no_worse(*zip(*runs, strict=True))


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
def test_the_layer_itself(rng, backend, order):
    import keras

    arrays, options = make(rng, CASES["stride 2"], "separable", "float32", order)
    if order == "depthwise_pointwise":
        layers = [keras.layers.SeparableConv2D(7, 3, 2, "same", activation="gelu")]
    else:
        layers = [
            keras.layers.Conv2D(7, 1, use_bias=False),
            keras.layers.DepthwiseConv2D(3, 2, "same", activation="gelu"),
        ]
    model = keras.Sequential([keras.Input(arrays["x"].shape[1:]), *layers])
    weights = list(arrays.values())[1:]
    model.set_weights(weights if order == "depthwise_pointwise" else [weights[1], weights[0], weights[2]])
    ours = fastsepconv.separable_conv2d(*arrays.values(), activation="gelu", order=order, backend=backend, **options)
    assert_close("y", ours, model.predict(arrays["x"], verbose=0))


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_an_empty_batch(backend, data_format, order):
    x = np.empty((0, 5, 7, 3) if data_format == "channels_last" else (0, 3, 5, 7), "float32")
    channels = 3 if order == "depthwise_pointwise" else 4
    depthwise = np.ones((3, 3, channels, 2), "float32")
    pointwise = np.ones((6, 4) if order == "depthwise_pointwise" else (3, 4), "float32")
    options = {"data_format": data_format, "order": order, "backend": backend, "padding": "same", "strides": 2}
    y = fastsepconv.separable_conv2d(x, depthwise, pointwise, activation="gelu", **options)
    outputs = 4 if order == "depthwise_pointwise" else 8
    assert y.shape == ((0, 3, 4, outputs) if data_format == "channels_last" else (0, outputs, 3, 4))
    dx, *weights = fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, y, **options)
    assert dx.shape == x.shape
    for gradient, shape in zip(weights, (depthwise.shape, pointwise.shape, (outputs,)), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(shape))


@pytest.mark.parametrize("where", ["x", "depthwise_kernel", "pointwise_kernel", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_go_where_keras_takes_them(rng, backend, where, value):
    arrays, options = make(rng, CASES["same"], "separable", "float32")
    arrays[where].flat[arrays[where].size // 2] = value
    dy = rng.normal(size=(2, 7, 9, 6)).astype("float32")
    theirs = by_keras(arrays, dy, **options)
    ours = run("separable", arrays, dy, backend, **options)
    for name, our, their in zip(["y", *(f"d_{name}" for name in arrays)], ours, theirs, strict=True):
        assert_close(name, our, their)


def test_zeros_of_the_padding_are_not_multiplied_by_a_nan(backend):
    """Keras takes it either way, as TensorFlow's code for the CPU does: here a tap outside the image is none."""
    kernel = np.ones((3, 3, 1, 1), "float32")
    kernel[0, 0] = np.nan
    y = fastsepconv.depthwise_conv2d(np.ones((1, 4, 5, 1), "float32"), kernel, padding="same", backend=backend)
    inside = np.ones((4, 5), bool)
    inside[0] = inside[:, 0] = False
    np.testing.assert_array_equal(np.isnan(y[0, :, :, 0]), inside)


def test_nan_survives_relu(backend):
    x = np.array([np.nan, -1.0, 2.0], "float32").reshape(1, 1, 3, 1)
    y = fastsepconv.pointwise_conv2d(x, np.ones((1, 1), "float32"), activation="relu", backend=backend)
    np.testing.assert_array_equal(y.ravel(), [np.nan, 0, 2])


def test_the_examples_in_the_docstrings():
    import doctest

    from fastsepconv import dispatch, ops

    for module in (ops, dispatch):
        results = doctest.testmod(module, extraglobs={"np": np, "fastsepconv": fastsepconv})
        assert results.failed == 0
    fastsepconv.set_backend("auto")
