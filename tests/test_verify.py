"""verify finds what differs, and nothing where nothing does."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from fastsepconv import FastDepthwiseConv2D, FastSeparableConv2D, convert, layers, verify
from fastsepconv.models import xception
from tests.tolerances import RELATIVE


def batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype="float32")


def small(separable=keras.layers.SeparableConv2D, depthwise=keras.layers.DepthwiseConv2D, **options) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 3))
    x = separable(4, 3, name="separable", **options)(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.5)(keras.layers.Activation("relu")(x))
    x = depthwise(3, strides=2, name="depthwise")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="top")(x), name="small")


def snapshot(model: keras.Model) -> list:
    return [*(type(layer) for layer in model.layers), *(v.numpy().tolist() for v in model.variables)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [small, lambda: convert(small())], ids=["stock", "converted"])
def test_equal_layers_are_found_equal(make, training):
    model = make()
    before = snapshot(model)
    report = verify(model, batch(4, 12, 12, 3), training=training)
    assert snapshot(model) == before
    assert report.max_output_error < 1e-5
    assert report.max_gradient_error < 1e-4
    assert [(layer.name, layer.kind) for layer in report.layers] == [
        ("separable", "FastSeparableConv2D"),
        ("norm", "BatchNormalization"),
        ("depthwise", "FastDepthwiseConv2D"),
        ("top", "Dense"),
    ]
    assert set(report.layers[0].gradient_errors) == {"depthwise_kernel", "pointwise_kernel", "bias"}
    assert set(report.layers[1].gradient_errors) == {"gamma", "beta"}


@pytest.fixture
def wrong_kernels(monkeypatch):
    """Kernels whose depthwise output is off by 1 %."""
    right = layers._kernels()

    class Wrong:
        separable_conv2d = staticmethod(right.separable_conv2d)

        @staticmethod
        def depthwise_conv2d(*args, **kwargs):
            return 1.01 * right.depthwise_conv2d(*args, **kwargs)

    monkeypatch.setattr(layers, "_kernels", lambda: Wrong)


def test_a_wrong_layer_is_found(wrong_kernels):
    report = verify(small(), batch(4, 12, 12, 3))
    errors = {layer.name: layer for layer in report.layers}
    assert errors["separable"].output_error < 1e-5
    assert errors["depthwise"].output_error == pytest.approx(0.01 * errors["depthwise"].output_size, rel=0.5)
    assert errors["depthwise"].gradient_errors["kernel"] == pytest.approx(0.01, rel=0.5)
    assert report.max_output_error > 1e-4
    assert report.max_gradient_error > 5e-3
    assert report.input_gradient_error > 5e-3


def test_gradients_of_the_models_own_loss():
    model = small(FastSeparableConv2D, FastDepthwiseConv2D)
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = batch(4, 12, 12, 3), np.array([0, 1, 2, 0])
    report = verify(model, x, y, training=True)
    assert 0 < report.max_gradient_error < 1e-4
    with pytest.raises(ValueError, match=r"argument `y`. Expected None, as .* has not been compiled"):
        verify(small(), x, y)


def test_takes_the_other_order_too():
    report = verify(small(FastSeparableConv2D, order="pointwise_depthwise", depth_multiplier=2), batch(4, 12, 12, 3))
    assert report.max_output_error < 1e-5
    assert report.max_gradient_error < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_a_deep_network_agrees_to_single_precision(training):
    keras.utils.set_random_seed(0)
    model = xception((32, 32, 1), 3, num_blocks=2)
    report = verify(model, batch(8, 32, 32, 1), training=training)
    assert report.max_output_error < 1e-5
    assert report.max_gradient_error < 1e-4


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_takes_half_precision(policy):
    model = xception((32, 32, 1), 3, num_blocks=0, dtype=policy)
    report = verify(model, batch(4, 32, 32, 1), training=True)
    assert report.max_output_error < 16 * RELATIVE[policy.removeprefix("mixed_")]


def test_double_precision_agrees_to_nine_digits():
    model = xception((32, 32, 1), 3, num_blocks=1, dtype="float64")
    model.compile("sgd", "sparse_categorical_crossentropy")
    report = verify(model, batch(4, 32, 32, 1), np.array([0, 1, 2, 0]), training=True)
    assert report.max_output_error < 1e-9
    assert report.max_gradient_error < 1e-9
    assert len([layer for layer in report.layers if layer.kind == "FastSeparableConv2D"]) == 13


def test_looks_into_nested_and_wrapped_models():
    inputs = keras.Input((2, 12, 12, 3))
    model = keras.Model(inputs, keras.layers.TimeDistributed(small())(inputs))
    report = verify(model, batch(2, 2, 12, 12, 3))
    assert [layer.name for layer in report.layers] == ["separable", "norm", "depthwise", "top"]
    assert report.max_output_error < 1e-5


def test_nan_in_the_same_places_is_no_difference():
    model = small()
    x = batch(2, 12, 12, 3)
    x[0] = np.nan
    assert verify(model, x).max_output_error < 1e-5


def test_nan_in_one_of_them_is(wrong_kernels, monkeypatch):
    wrong = layers._kernels()
    right = wrong.depthwise_conv2d
    monkeypatch.setattr(wrong, "depthwise_conv2d", lambda *args, **kwargs: np.nan * right(*args, **kwargs))
    report = verify(small(), batch(2, 12, 12, 3))
    assert np.isnan(report.max_output_error)
    assert np.isnan(report.max_gradient_error)


def test_report_is_a_table_and_plain_data():
    report = verify(small(), batch(2, 12, 12, 3))
    data = json.loads(json.dumps(report.as_dict()))
    assert data["model"] == "small"
    assert data["layers"][0]["gradient_errors"].keys() == {"depthwise_kernel", "pointwise_kernel", "bias"}
    assert data["max_gradient_error"] == report.max_gradient_error
    lines = str(report).splitlines()
    assert len(lines) == 2 + 4 + 2
    assert lines[2].split()[:2] == ["separable", "FastSeparableConv2D"]
    assert f"{report.max_output_error:.1e}" in lines[-2]


@pytest.mark.parametrize("x", [batch(1, 8, 8), batch(1, 8, 8, 4), batch(0, 8, 8, 3), None, [batch(1, 8, 8, 3)] * 2])
def test_an_input_that_is_none_is_named(x):
    model = keras.Sequential([keras.Input((None, 8, 3)), keras.layers.DepthwiseConv2D(3)])
    with pytest.raises(ValueError, match="argument `x`"):
        verify(model, x)


def test_wants_something_to_compare():
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match="Expected a model with a SeparableConv2D or DepthwiseConv2D"):
        verify(model, batch(1, 8, 8, 3))
    with pytest.raises(TypeError, match=r"Expected a keras.Model"):
        verify(None, batch(1, 8, 8, 3))
