"""The Keras layers on PyTorch: Keras's results, in models, in files, converted and verified, without TensorFlow."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

from fastsepconv import FastDepthwiseConv2D, FastSeparableConv2D, convert, revert, verify
from fastsepconv.models import pointwise_then_depthwise, xception

from ..tolerances import RELATIVE, assert_close, assert_no_worse
from .torch_cases import array, poisoned, torch

__all__ = ["poisoned"]

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="Keras runs on another backend here; `make test-torch` sets KERAS_BACKEND",
)

PAIRS = [
    pytest.param(FastSeparableConv2D, keras.layers.SeparableConv2D, {"filters": 5}, id="separable"),
    pytest.param(FastDepthwiseConv2D, keras.layers.DepthwiseConv2D, {}, id="depthwise"),
]
POINTWISE_FIRST = {"filters": 3, "kernel_size": 3, "depth_multiplier": 2, "order": "pointwise_depthwise"}


def image(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def with_weights_of(layer: keras.Layer, other: keras.Layer, shape: tuple) -> keras.Layer:
    other.build(shape)
    other.set_weights(layer.get_weights())
    return other


def outputs_and_gradients(layer: keras.Layer, x: np.ndarray) -> list:
    x = torch.tensor(x, requires_grad=True)
    y = layer(x)
    loss = (y.double() * torch.tensor(image(*y.shape, dtype="float64"))).sum()
    return [y, *torch.autograd.grad(loss, [x, *(weight.value for weight in layer.trainable_weights)])]


def built(cls, shape, **arguments) -> keras.Layer:
    layer = cls(**arguments)
    layer.build(shape)
    random = np.random.default_rng(1)
    layer.set_weights([random.standard_normal(weight.shape) for weight in layer.weights])
    return layer


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": "same", "strides": 2, "activation": "relu"},
        {"kernel_size": (1, 4), "padding": "same", "dilation_rate": (1, 2), "depth_multiplier": 3},
        {"kernel_size": 3, "use_bias": False, "activation": "softmax"},
        {"kernel_size": 3, "padding": "same", "data_format": "channels_first"},
        {"kernel_size": 2, "dtype": "float64"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_computes_what_keras_computes(fast, stock, extra, arguments):
    shape = (2, 7, 9, 8)
    arguments = {**extra, **arguments}
    ours = built(fast, shape, **arguments)
    theirs = with_weights_of(ours, stock(**arguments), shape)
    exact = with_weights_of(ours, stock(**arguments | {"dtype": "float64"}), shape)
    x = image(*shape, dtype=arguments.get("dtype", "float32"))
    true = [array(tensor) for tensor in outputs_and_gradients(exact, x.astype("float64"))]
    results = [[array(tensor) for tensor in outputs_and_gradients(layer, x)] for layer in (ours, theirs)]
    for tensor, true_tensor in zip(results[0], true, strict=True):
        assert_close("output or gradient", tensor, true_tensor)
    if x.dtype != np.float64:
        assert_no_worse([results[0]], [results[1]], [true])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_pointwise_first_computes_what_two_stock_layers_compute(data_format):
    shape = (2, 9, 7, 4) if data_format == "channels_last" else (2, 4, 9, 7)
    options = {"strides": 2, "padding": "same", "activation": "relu", "data_format": data_format}
    ours = built(FastSeparableConv2D, shape, **POINTWISE_FIRST, **options)
    exact = pointwise_then_depthwise(3, 3, depth_multiplier=2, dtype="float64", **options)
    exact = with_weights_of(ours, exact, shape)
    x = image(*shape)
    true = outputs_and_gradients(exact, x.astype("float64"))
    for tensor, true_tensor in zip(outputs_and_gradients(ours, x), true, strict=True):
        assert_close("output or gradient", array(tensor), array(true_tensor))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_follows_the_dtype_policy(fast, stock, extra, policy):
    shape = (2, 6, 6, 4)
    ours = built(fast, shape, kernel_size=3, dtype=policy, **extra)
    theirs = with_weights_of(ours, stock(kernel_size=3, dtype=policy, **extra), shape)
    x = image(*shape)
    for our, their in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
        assert our.dtype is their.dtype
        scale = float(their.detach().abs().max())
        error = float((our.detach().double() - their.detach().double()).abs().max())
        assert error <= 4 * RELATIVE[ours.compute_dtype] * scale


@pytest.mark.parametrize(
    ("cls", "arguments", "shape"),
    [
        (FastSeparableConv2D, {"filters": 5, "kernel_size": 2, "depth_multiplier": 5}, (3, 4, 4, 5)),
        (FastSeparableConv2D, POINTWISE_FIRST, (3, 3, 3, 6)),
        (FastDepthwiseConv2D, {"kernel_size": 2, "depth_multiplier": 5, "strides": 2}, (3, 2, 2, 20)),
    ],
    ids=str,
)
def test_passes_keras_own_test_of_a_layer(cls, arguments, shape):
    from keras.src.testing import TestCase

    TestCase().run_layer_test(
        cls,
        init_kwargs=arguments,
        input_shape=(3, 5, 5, 4),
        expected_output_shape=shape,
        expected_num_losses=0,
        supports_masking=False,
    )


def small_model(separable=FastSeparableConv2D, depthwise=FastDepthwiseConv2D, **options) -> keras.Sequential:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            separable(4, 3, activation="relu", pointwise_constraint="max_norm", **options),
            # Normalisation takes a bias away: its gradient is rounding alone, which Adam makes whole steps of.
            depthwise(3, depth_multiplier=2, strides=2, use_bias=False),
            keras.layers.BatchNormalization(),
            separable(2, 3, padding="same", depth_multiplier=2),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )


def stock_model(**options) -> keras.Sequential:
    return small_model(keras.layers.SeparableConv2D, keras.layers.DepthwiseConv2D, **options)


DATA = image(12, 9, 9, 3), image(12, 2)


def test_trains_as_the_stock_model_does_and_says_nothing():
    losses, predictions = [], []
    for model in (small_model(depthwise_regularizer="l2"), stock_model(depthwise_regularizer="l2")):
        model.compile("adam", "mse")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*fastsepconv")
            history = model.fit(*DATA, batch_size=5, epochs=3, shuffle=False, verbose=0)
        losses.append([*history.history["loss"], model.evaluate(*DATA, verbose=0)])
        predictions.append(model.predict(DATA[0], verbose=0))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    np.testing.assert_allclose(*predictions, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", "mse")
    losses = model.fit(*DATA, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.predict(DATA[0], verbose=0).dtype.name == policy.removeprefix("mixed_")


def test_a_saved_model_comes_back_on_our_layers(tmp_path):
    model = small_model()
    model.compile("adam", "mse")
    model.fit(*DATA, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    np.testing.assert_array_equal(loaded.predict(DATA[0], verbose=0), model.predict(DATA[0], verbose=0))
    after = [each.fit(*DATA, verbose=0).history["loss"] for each in (loaded, model)]
    np.testing.assert_allclose(*after, rtol=1e-6)


def test_converted_and_reverted():
    stock = stock_model()
    stock.compile("adam", "mse")
    fast = convert(stock)
    assert [type(layer) for layer in fast.layers] == [type(layer) for layer in small_model().layers]
    assert [type(layer) for layer in revert(fast).layers] == [type(layer) for layer in stock.layers]
    np.testing.assert_allclose(fast.predict(DATA[0], verbose=0), stock.predict(DATA[0], verbose=0), atol=1e-6)
    for model in (fast, stock):
        model.fit(*DATA, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(fast.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_verify_finds_equal_layers_equal_and_changes_nothing(training):
    model = xception((32, 32, 1), 3, num_blocks=1, dtype="float64")
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = model.get_weights()
    report = verify(model, image(4, 32, 32, 1, dtype="float64"), np.array([0, 1, 2, 0]), training=training)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert report.max_output_error < 1e-9  # often 0: PyTorch adds in the same order
    assert 0 < report.max_gradient_error < 1e-9
    assert report.input_gradient_error < 1e-9
    assert len([layer for layer in report.layers if layer.kind == "FastSeparableConv2D"]) == 13


def test_verify_finds_a_wrong_layer(monkeypatch):
    from fastsepconv import layers

    right = layers._kernels()

    class Wrong:
        separable_conv2d = staticmethod(right.separable_conv2d)

        @staticmethod
        def depthwise_conv2d(*args, **kwargs):
            return 1.01 * right.depthwise_conv2d(*args, **kwargs)

    monkeypatch.setattr(layers, "_kernels", lambda: Wrong)
    report = verify(small_model(), DATA[0])
    errors = {layer.kind: layer for layer in report.layers}
    assert errors["FastSeparableConv2D"].output_error < 1e-5
    assert errors["FastDepthwiseConv2D"].output_error > 1e-3 * errors["FastDepthwiseConv2D"].output_size
    assert errors["FastDepthwiseConv2D"].gradient_errors["kernel"] == pytest.approx(0.01, rel=0.5)
    assert report.max_gradient_error > 5e-3


def test_needs_no_tensorflow(tmp_path):
    code = """
import sys
sys.modules["tensorflow"] = None  # whatever asks for it is told that it is not there
import numpy as np, keras, fastsepconv
model = fastsepconv.models.xception((32, 32, 1), 3, num_blocks=0)
model.compile("adam", "sparse_categorical_crossentropy")
x, y = np.ones((4, 32, 32, 1), "float32"), np.zeros(4)
model.fit(x, y, verbose=0)
model.save("model.keras")
loaded = keras.models.load_model("model.keras")
report = fastsepconv.verify(fastsepconv.convert(fastsepconv.revert(loaded)), x)
print(keras.backend.backend(), report.max_gradient_error < 1e-3)
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["torch", "True"], done.stderr
