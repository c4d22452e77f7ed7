"""Frozen models: the same results, kernels packed once, given back in the end; nothing but constants is kept."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow_freeze, tensorflow_ops
from fastsepconv.layers import FastDepthwiseConv2D, FastSeparableConv2D

from . import oracle
from .cases import operands

freezing = importlib.import_module("fastsepconv.freeze")  # the module: the package has the function of that name


def marks(nodes, attribute: str) -> list[int]:
    return [node.attr[attribute].i for node in nodes if attribute in node.attr]


@pytest.fixture
def frozen_nodes(monkeypatch):
    """The nodes that `freeze` marks."""
    found, mark = [], tensorflow_freeze._take_in_relus
    monkeypatch.setattr(tensorflow_freeze, "_take_in_relus", lambda nodes: (mark(nodes), found.extend(nodes)))
    return found


ATTRIBUTES = ("keep", 0, "relu", 0)


def small(order="depthwise_pointwise", **arguments):
    layers = [
        FastSeparableConv2D(24, 3, padding="same", depth_multiplier=2, use_bias=False, order=order, **arguments),
        keras.layers.BatchNormalization(**arguments),
        keras.layers.ReLU(**arguments),
        FastDepthwiseConv2D(3, depth_multiplier=2, **arguments),
        keras.layers.BatchNormalization(center=False, scale=False, **arguments),
        FastSeparableConv2D(5, 3, strides=2, use_bias=False, order=order, **arguments),
    ]
    return keras.Sequential([keras.Input((9, 8, 6)), *layers])


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
    operations = [node.op for node in frozen_nodes]
    assert marks(frozen_nodes, "keep") == [1, 1]
    assert "Relu" not in operations and "Rsqrt" not in operations
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
    with pytest.raises(tf.errors.InvalidArgumentError):
        frozen(np.zeros((1, 9, 8, 7)))


class Node:
    """A node that was told to keep a kernel that is a variable's."""

    def __init__(self, rng):
        self.x, kernel, _ = operands(rng, "pointwise", (2, 5, 5, 6), (1, 1), 1, 40, "float32")
        self.variable = tf.Variable(kernel)
        self.variable.assign_add(0 * kernel)  # now it has a buffer of its own

        name = "FastsepconvPointwise"

        @tf.function
        def graph(x):
            return tensorflow_ops._apply_in_graph(name, [x, self.variable, []], ("keep", 1, "relu", 0))[0]

        self.graph = graph

    def expected(self):
        return oracle.convolve("pointwise", [self.x, self.variable])


def test_a_kernel_is_packed_once(rng):
    """Seen where what TensorFlow would never do is done: the values at the kernel's address are exchanged."""
    node = Node(rng)
    first = node.graph(node.x).numpy()
    np.testing.assert_allclose(first, node.expected(), rtol=1e-5, atol=1e-5)
    values = np.asarray(memoryview(node.variable.value()))
    ctypes.memset(values.ctypes.data, 0, values.nbytes)
    assert not node.expected().numpy().any()
    np.testing.assert_array_equal(node.graph(node.x), first)


def test_a_kernel_elsewhere_is_another(rng):
    """What a node keeps is not taken for a kernel that it did not pack."""
    node = Node(rng)
    for _ in range(5):
        np.testing.assert_allclose(node.graph(node.x), node.expected(), rtol=1e-5, atol=1e-5)
        node.variable.assign_add(tf.ones_like(node.variable))


def test_variables_arrays_and_results_are_not_kept(rng):
    x, depthwise, pointwise, _ = operands(rng, "separable", (1, 5, 5, 3), (3, 3), 1, 4, "float32")
    variable = tf.Variable(pointwise)
    kernels = {
        "variable": lambda: variable,
        "array": lambda: pointwise.numpy(),
        "python": lambda: tf.numpy_function(lambda: pointwise.numpy(), [], tf.float32),
        "computed": lambda: 2 * variable,
    }
    for name, kernel in kernels.items():
        graph = tf.function(
            lambda x, kernel=kernel: fastsepconv.bridge.tensorflow.separable_conv2d(x, depthwise, kernel())
        )
        assert marks(graph.get_concrete_function(x).graph.as_graph_def().node, "keep") == [0], name


def test_only_constants_are_marked():
    graph = tf.Graph()
    with graph.as_default():
        x, fed = (tf.compat.v1.placeholder(tf.float32, (1, 5, 5, 4)), tf.compat.v1.placeholder(tf.float32, (4, 3)))
        constant = tf.constant(np.ones((4, 3)))
        for kernel in (fed, tf.identity(fed), constant, tf.cast(tf.identity(constant), tf.float32), 2 * constant):
            tensorflow_ops._apply_in_graph("FastsepconvPointwise", [x, tf.cast(kernel, tf.float32), []], ATTRIBUTES)
    nodes = graph.as_graph_def().node
    tensorflow_freeze._keep_constants(nodes)
    assert marks(nodes, "keep") == [0, 0, 1, 1, 0]


def test_a_relu_is_taken_in_where_nothing_else_reads_what_it_reads():
    graph = tf.Graph()
    with graph.as_default():
        x, kernel = tf.compat.v1.placeholder(tf.float32, (1, 5, 5, 4)), tf.ones((4, 3))
        y = [tensorflow_ops._apply_in_graph("FastsepconvPointwise", [x, kernel, []], ATTRIBUTES)[0] for _ in range(3)]
        tf.nn.relu(y[0])
        tf.nn.relu(y[1]), tf.abs(y[1])
        tf.nn.relu(tf.abs(y[2]))
    nodes = graph.as_graph_def().node
    tensorflow_freeze._take_in_relus(nodes)
    assert marks(nodes, "relu") == [1, 0, 0]
    assert [node.op for node in nodes].count("Relu") == 2


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


def test_several_threads_run_a_frozen_model(rng):
    model = small()
    x = rng.standard_normal((2, 9, 8, 6)).astype("float32")
    expected, frozen, wrong = model(x).numpy(), fastsepconv.freeze(model), []

    def run():
        try:
            for _ in range(50):
                np.testing.assert_allclose(frozen(x), expected, rtol=1e-5, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    runners = [threading.Thread(target=run) for _ in range(4)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_what_is_kept_goes_with_the_model(rng):
    """Each of these keeps 16 MiB, and TensorFlow's constant as much."""
    x = tf.ones((1, 3, 3, 1024))

    def frozen_once():
        model = keras.Sequential(
            [keras.Input((3, 3, 1024)), FastSeparableConv2D(4096, 3, depthwise_initializer="ones")]
        )
        fastsepconv.freeze(model)(x)

    for _ in range(3):
        frozen_once()
        gc.collect()
    before = resident_bytes()
    for _ in range(10):
        frozen_once()
        gc.collect()
    assert resident_bytes() - before < 5 * (16 << 20)
