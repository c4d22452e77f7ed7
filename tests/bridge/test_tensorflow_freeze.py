"""Frozen models: the same results, batch normalisation folded, bad models refused, no gradients."""

from __future__ import annotations

import importlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow_freeze
from fastsepconv.layers import FastSeparableConv2D

from .cases import add_node
from .frozen import frozen_nodes, marks, needed, small

__all__ = ["frozen_nodes"]

freezing = importlib.import_module("fastsepconv.freeze")  # the module: the package has the function of that name


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
def test_a_frozen_model_predicts_as_the_model_did(dtype, order, rng, frozen_nodes):
    model = small(order, dtype=dtype)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()])
    frozen = fastsepconv.freeze(model)
    x = rng.standard_normal((3, 9, 8, 6))
    expected = model(x, training=False)
    for batch in (3, 1, 3):
        y = frozen(x[:batch])
        assert y.dtype == expected.dtype
        tolerance = {"float32": 1e-5, "float64": 1e-13, "mixed_bfloat16": 0.05}[dtype]
        np.testing.assert_allclose(
            *(np.float64(each[:batch]) for each in (y, expected)), rtol=tolerance, atol=tolerance
        )
    assert marks(frozen_nodes, "keep") == [1, 1]
    assert not {"Relu", "Rsqrt"} & needed(frozen_nodes)
    model.set_weights([0 * weight for weight in model.get_weights()])
    np.testing.assert_array_equal(frozen(x), y)


@pytest.mark.parametrize("structure", [list, lambda pair: {"b": pair[0], "a": pair[1]}], ids=["list", "dict"])
def test_several_inputs_and_outputs(structure, rng):
    first, second = (keras.Input((5, 5, 4), name=name) for name in "ba")
    y = FastSeparableConv2D(3, 3)(first - second)
    model = keras.Model(structure([first, second]), {"y": y, "sum": keras.ops.sum(y)})
    x = structure([rng.standard_normal((2, 5, 5, 4)).astype("float32") for _ in range(2)])
    frozen, expected = fastsepconv.freeze(model)(*keras.tree.flatten(x)), model(x)
    assert frozen.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(frozen[name], value, rtol=1e-5, atol=1e-5)


class WithoutConfiguration(keras.layers.Layer):
    def call(self, inputs):
        return inputs

    def get_config(self):
        raise NotImplementedError("no configuration")


def test_bad_models():
    with pytest.raises(TypeError, match=r"`model`\. Expected a Keras model"):
        fastsepconv.freeze(lambda x: x)
    with pytest.raises(ValueError, match=r"`model`\. Expected a model that knows its inputs"):
        fastsepconv.freeze(keras.Sequential([FastSeparableConv2D(3, 3)]))
    model = small()
    model.add(WithoutConfiguration())
    with pytest.raises(ValueError, match=r"`model`.*register_keras_serializable\)\. Received: .*no configuration"):
        fastsepconv.freeze(model)
    frozen = fastsepconv.freeze(small())
    with pytest.raises(ValueError, match=r"`inputs`\. Expected 1 of them"):
        frozen(np.zeros((1, 9, 8, 6)), np.zeros((1, 9, 8, 6)))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"/separable_conv2d.*/FastsepconvSeparable"):
        frozen(np.zeros((1, 9, 8, 7)))


def test_there_are_no_gradients(rng):
    x = tf.constant(rng.standard_normal((1, 9, 8, 6)), "float32")
    frozen = fastsepconv.freeze(small())
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = frozen(x)
    assert tape.gradient(y, x) is None
    with tf.Graph().as_default():
        x = tf.compat.v1.placeholder(tf.float32, (1, 5, 5, 4))
        y = add_node("Pointwise", x, tf.ones((4, 3)), relu=1)
        with pytest.raises(LookupError, match="A frozen model has no gradients"):
            tf.gradients(y, x)


def test_variables_are_inputs_too(rng):
    model = small()
    x = rng.standard_normal((1, 9, 8, 6)).astype("float32")
    frozen = fastsepconv.freeze(model)
    for variable in (tf.Variable(x), keras.Variable(x)):
        np.testing.assert_allclose(frozen(variable), model(x), rtol=1e-4, atol=1e-5)


ON_TWO_DEVICES = """
import keras, numpy as np, tensorflow as tf
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
import fastsepconv
x = keras.Input((9, 8, 6))
model = keras.Model(x, [fastsepconv.FastSeparableConv2D(5, 3)(x), x])
frozen, image = fastsepconv.freeze(model), np.ones((2, 9, 8, 6), "float32")
for device in ("CPU:1", "CPU:0"):
    with tf.device(device):
        given = tf.constant(image)
    for ours, theirs in zip(frozen(given), model(image)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
"""


def test_inputs_on_two_devices():
    """In a process with two: parts of a graph wait for each other there."""
    done = subprocess.run([sys.executable, "-c", ON_TWO_DEVICES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_frozen_model_in_a_graph(rng):
    x = rng.standard_normal((2, 9, 8, 6)).astype("float32")
    model = small()
    frozen = fastsepconv.freeze(model)

    @tf.function
    def graph(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = frozen(x)
        assert tape.gradient(y, x) is None
        return y

    np.testing.assert_allclose(graph(x), model(x), rtol=1e-4, atol=1e-5)


class Either(keras.layers.Layer):
    """Doubles what is positive on the whole."""

    def call(self, x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: 2 * x, lambda: x)


class Called(keras.layers.Layer):
    """Calls a function that stays one."""

    def call(self, x):
        return tf.function(tf.sin, autograph=False, experimental_attributes={"_noinline": True})(x)


LAST_LAYERS = {
    "plain": ([], "SINGLE_THREADED_EXECUTOR"),
    "condition": ([Either()], ""),
    "function": ([Called()], ""),
    "loop": ([keras.layers.Reshape((7, -1)), keras.layers.GRU(4)], ""),
}


@pytest.mark.parametrize("kind", LAST_LAYERS)
def test_nodes_run_in_turn_where_they_can(kind, rng, monkeypatch):
    layers, executor = LAST_LAYERS[kind]
    model = keras.Sequential([keras.Input((7, 8, 6)), FastSeparableConv2D(5, 3, padding="same"), *layers])
    frozen, calls, call = fastsepconv.freeze(model), [], tensorflow_freeze._call
    monkeypatch.setattr(tensorflow_freeze, "_call", lambda *given: (calls.append(given[2]), call(*given))[1])
    for sign in (1, -1):
        x = np.abs(rng.standard_normal((2, 7, 8, 6))).astype("float32") * sign
        np.testing.assert_allclose(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls == [executor] * 2


def functional(rng, **changes):
    """A model in which one batch normalisation must stay as it is, for a reason that `changes` tell."""
    x = keras.Input((6, 6, 4))
    layer = FastSeparableConv2D(4, 3, activation=changes.get("activation"), padding="same")
    y = layer(layer(x)) if "shared" in changes else layer(x)
    z = keras.layers.BatchNormalization(axis=changes.get("axis", -1))(y)
    outputs = [z, y] if "output" in changes else z + y if "read_twice" in changes else z
    model = keras.Model(x, outputs)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()])
    return model


STAYING = [{"activation": "tanh"}, {"shared": True}, {"axis": 1}, {"output": True}, {"read_twice": True}]


@pytest.mark.parametrize("changes", [{}, *STAYING], ids=str)
def test_batch_normalisation_is_folded_only_where_it_can_be(changes, rng):
    model, x = functional(rng, **changes), rng.standard_normal((2, 6, 6, 4)).astype("float32")
    assert len(list(freezing._foldable(model))) == (not changes)
    weights = model.get_weights()
    for frozen, expected in zip(*map(tf.nest.flatten, (fastsepconv.freeze(model)(x), model(x))), strict=True):
        np.testing.assert_allclose(frozen, expected, rtol=1e-5, atol=1e-4)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_xception(rng):
    model = fastsepconv.models.xception(input_shape=(32, 32, 1), classes=7)
    model.set_weights([rng.normal(1.0, 0.05, w.shape) if w.ndim == 1 else w for w in model.get_weights()])
    x = rng.standard_normal((2, 32, 32, 1)).astype("float32")
    np.testing.assert_allclose(fastsepconv.freeze(model)(x), model(x, training=False), rtol=1e-4, atol=1e-5)
    assert len(list(freezing._foldable(model))) >= 30
