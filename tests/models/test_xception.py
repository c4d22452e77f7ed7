"""The tutorial's Xception: its shape, its 34 separable convolutions, and its stock twin."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastsepconv import FastSeparableConv2D
from fastsepconv.models import entry_flow, exit_flow, middle_flow, pointwise_then_depthwise, xception


def images(count: int = 4, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).random((count, side, side, 1), dtype="float32")


def described(model: keras.Model) -> list:
    return [(weight.path, weight.shape, weight.dtype) for weight in model.weights]


def test_is_the_tutorials_network():
    model = xception()
    separable = [layer for layer in model.layers if isinstance(layer, FastSeparableConv2D)]
    assert len(separable) == 34
    assert [layer.filters for layer in separable] == [128] * 2 + [256] * 2 + [728] * 26 + [728, 1024] * 2
    assert (model.input_shape, model.output_shape) == ((None, 48, 48, 1), (None, 7))
    assert model.get_layer("middle_block8_add").output.shape == (None, 3, 3, 728)
    assert model.get_layer("exit_separable4").output.shape == (None, 2, 2, 1024)


def test_twins_have_the_same_names_weights_and_results():
    ours = xception((32, 32, 1), 3, num_blocks=1)
    theirs = xception((32, 32, 1), 3, keras.layers.SeparableConv2D, num_blocks=1)
    assert [layer.name for layer in ours.layers] == [layer.name for layer in theirs.layers]
    assert described(ours) == described(theirs)
    assert not any(isinstance(layer, FastSeparableConv2D) for layer in theirs.layers)
    theirs.set_weights(ours.get_weights())
    for training in (False, True):
        np.testing.assert_allclose(ours(images(), training=training), theirs(images(), training=training), atol=1e-4)


def test_pointwise_first_equals_stock_layers_in_that_order():
    ours = xception((32, 32, 1), 3, num_blocks=1, order="pointwise_depthwise")
    theirs = xception((32, 32, 1), 3, pointwise_then_depthwise, num_blocks=1)
    assert [tuple(weight.shape) for weight in ours.weights] == [tuple(weight.shape) for weight in theirs.weights]
    assert not any(isinstance(layer, FastSeparableConv2D) for layer in theirs._flatten_layers())
    theirs.set_weights(ours.get_weights())
    results = []
    for model in (ours, theirs):
        with tf.GradientTape() as tape:
            y = model(images())
            loss = tf.reduce_sum(y * tf.constant([1.0, -2.0, 3.0]))
        results.append([y, *tape.gradient(loss, model.trainable_variables)])
    for our, their in zip(*results, strict=True):
        assert np.linalg.norm(our - their) <= 1e-3 * np.linalg.norm(their) + 1e-12


def test_flows_can_be_used_alone():
    inputs = keras.Input((40, 56, 3))
    x = entry_flow(inputs, keras.layers.SeparableConv2D)
    assert x.shape == (None, 3, 4, 728)
    x = middle_flow(x, num_blocks=2, batch_norm_momentum=0.9, dtype="mixed_bfloat16")
    assert (x.shape, x.dtype) == ((None, 3, 4, 728), "bfloat16")
    x = exit_flow(x, FastSeparableConv2D, order="pointwise_depthwise")
    assert x.shape == (None, 2, 2, 1024)
    model = keras.Model(inputs, x)
    norms = [layer.momentum for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert norms.count(0.9) == 6


@pytest.mark.parametrize(("dtype", "top"), [("mixed_float16", "float32"), ("float64", "float64"), (None, "float32")])
def test_dtype_reaches_every_layer(dtype, top):
    model = xception((32, 32, 1), 3, num_blocks=0, dtype=dtype)
    compute = {layer.compute_dtype for layer in model.layers if isinstance(layer, FastSeparableConv2D)}
    assert compute == {keras.DTypePolicy(dtype or "float32").compute_dtype}
    y = model(images())
    assert y.dtype == top
    np.testing.assert_allclose(np.sum(y, axis=-1), 1.0, rtol=1e-5)


def test_without_top_it_ends_in_features_of_any_image_size():
    model = xception((None, None, 1), num_blocks=0, include_top=False)
    assert model.output_shape == (None, None, None, 1024)
    assert model(images(1, 50)).shape == (1, 2, 2, 1024)


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("input_shape", (48, 48), ValueError),
        ("input_shape", (48, 48, 0), ValueError),
        ("input_shape", (48, 48, None), ValueError),
        ("input_shape", 48, ValueError),
        ("classes", 0, ValueError),
        ("classes", 2.5, ValueError),
        ("num_blocks", -1, ValueError),
        ("num_blocks", True, ValueError),
        ("separable_layer", 3, TypeError),
        ("order", "depthwise", ValueError),
    ],
)
def test_bad_arguments_are_named(argument, value, error):
    with pytest.raises(error, match=f"argument `{argument}`"):
        xception(**{argument: value})


def test_learns_a_batch():
    keras.utils.set_random_seed(0)
    model = xception((32, 32, 1), 4, num_blocks=0, batch_norm_momentum=0.5)
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(images(8), np.arange(8) % 4, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.2 * history["loss"][0]
    assert history["accuracy"][-1] == 1.0
