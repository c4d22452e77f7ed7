"""The Keras layers in models: training, saving, cloning, weight files shared with stock models."""

from __future__ import annotations

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastsepconv import FastDepthwiseConv2D, FastSeparableConv2D


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def small_model(separable=FastSeparableConv2D, depthwise=FastDepthwiseConv2D, regularizer="l2") -> keras.Sequential:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            separable(4, 3, activation="relu", depthwise_regularizer=regularizer, pointwise_constraint="max_norm"),
            depthwise(3, depth_multiplier=2, strides=2, activity_regularizer=regularizer),
            separable(2, 3, padding="same", depth_multiplier=2),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )


def stock_model() -> keras.Sequential:
    return small_model(keras.layers.SeparableConv2D, keras.layers.DepthwiseConv2D)


DATA = image(12, 9, 9, 3), image(12, 2)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_trains_as_the_stock_model_does(run_eagerly):
    losses, predictions = [], []
    for model in (small_model(), stock_model()):
        model.compile("adam", "mse", run_eagerly=run_eagerly)
        history = model.fit(*DATA, batch_size=5, epochs=3, shuffle=False, verbose=0)
        losses.append([*history.history["loss"], model.evaluate(*DATA, verbose=0)])
        predictions.append(model.predict(DATA[0], verbose=0))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    np.testing.assert_allclose(*predictions, atol=1e-4)


def test_is_left_out_of_xla():
    model = small_model()
    with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
        model.compile("adam", "mse", jit_compile=True)
    assert not model.jit_compile
    assert np.isfinite(model.fit(*DATA, verbose=0).history["loss"]).all()


def test_mixed_precision_trains():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = small_model(regularizer=None)  # Keras does not add losses of two dtypes
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", "mse")
    losses = model.fit(*DATA, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.predict(DATA[0], verbose=0).dtype == np.float16


def test_a_saved_model_comes_back_on_our_layers(tmp_path):
    model = small_model()
    model.compile("adam", "mse")
    model.fit(*DATA, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    assert loaded.to_json() == model.to_json()
    np.testing.assert_array_equal(loaded.predict(DATA[0], verbose=0), model.predict(DATA[0], verbose=0))
    assert int(loaded.optimizer.iterations) == 1
    np.testing.assert_allclose(
        loaded.fit(*DATA, verbose=0).history["loss"], model.fit(*DATA, verbose=0).history["loss"], rtol=1e-6
    )


def test_an_exported_model_computes_the_same(tmp_path):
    model = small_model()
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_array_equal(exported.serve(DATA[0]), model.predict(DATA[0], verbose=0))


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize(
    ("source", "target"), [(small_model, stock_model), (stock_model, small_model)], ids=["to stock", "from stock"]
)
def test_weight_files_go_both_ways(source, target, suffix, tmp_path):
    source, target = source(), target()
    target.set_weights([weight + 1 for weight in target.get_weights()])
    path = tmp_path / f"model{suffix}"
    (source.save if suffix == ".keras" else source.save_weights)(path)
    target.load_weights(path)
    for ours, theirs in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("clone", [keras.models.clone_model, copy.deepcopy], ids=["clone_model", "deepcopy"])
def test_a_clone_has_our_layers(clone):
    model = small_model()
    cloned = clone(model)
    assert [type(layer) for layer in cloned.layers] == [type(layer) for layer in model.layers]
    assert cloned.to_json() == model.to_json()
