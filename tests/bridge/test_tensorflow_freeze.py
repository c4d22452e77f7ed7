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
from fastsepconv.bridge import tensorflow_freeze
from fastsepconv.layers import FastDepthwiseConv2D, FastSeparableConv2D

from . import oracle
from .cases import add_node, operands

freezing = importlib.import_module("fastsepconv.freeze")  # the module: the package has the function of that name


def marks(nodes, attribute: str) -> list[int]:
    return [node.attr[attribute].i for node in nodes if attribute in node.attr]


@pytest.fixture
def frozen_nodes(monkeypatch):
    """The nodes that `freeze` has marked."""
    found, mark = [], tensorflow_freeze._take_in_relus_of_x
    monkeypatch.setattr(tensorflow_freeze, "_take_in_relus_of_x", lambda nodes: (mark(nodes), found.extend(nodes)))
    return found


def needed(nodes) -> set[str]:
    """The operations that the results of a graph come from."""
    named, found = {node.name: node for node in nodes}, set()
    wanted = [node.name for node in nodes if node.name.startswith("Identity")]
    while wanted:
        node = named[wanted.pop()]
        found.add(node.op)
        wanted += [name.partition(":")[0].lstrip("^") for name in node.input]
    return found


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
    with pytest.raises(tf.errors.InvalidArgumentError):
        frozen(np.zeros((1, 9, 8, 7)))


class Node:
    """A node that was told to keep a kernel that is a variable's."""

    def __init__(self, rng):
        self.x, kernel, _ = operands(rng, "pointwise", (2, 5, 5, 6), (1, 1), 1, 40, "float32")
        self.variable = tf.Variable(kernel)
        self.variable.assign_add(0 * kernel)  # now it has a buffer of its own

        @tf.function
        def graph(x):
            return add_node("Pointwise", x, self.variable, keep=1)

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
            add_node("Pointwise", x, tf.cast(kernel, tf.float32))
    nodes = graph.as_graph_def().node
    tensorflow_freeze._keep_constants(nodes)
    assert marks(nodes, "keep") == [0, 0, 1, 1, 0]


def test_a_relu_is_taken_in_where_nothing_else_reads_what_it_reads():
    graph = tf.Graph()
    with graph.as_default():
        x, kernel = tf.compat.v1.placeholder(tf.float32, (1, 5, 5, 4)), tf.ones((4, 3))
        y = [add_node("Pointwise", x, kernel) for _ in range(3)]
        tf.nn.relu(y[0])
        tf.nn.relu(y[1]), tf.abs(y[1])
        tf.nn.relu(tf.abs(y[2]))
    nodes = graph.as_graph_def().node
    tensorflow_freeze._take_in_relus(nodes)
    assert marks(nodes, "relu") == [1, 0, 0]
    assert [node.op for node in nodes].count("Relu") == 2


def test_a_relu_of_x_is_taken_in_where_nothing_else_reads_it():
    graph = tf.Graph()
    with graph.as_default():
        x, kernels = tf.compat.v1.placeholder(tf.float64, (1, 5, 5, 4)), (tf.ones((3, 3, 4, 1)), tf.ones((4, 3)))
        both, shared, product, rounded = (tf.nn.relu(x, name=name) for name in ("both", "shared", "product", "rounded"))
        ours = [tf.cast(tf.identity(each), tf.float32) for each in (both, both, shared, rounded)]
        add_node("Separable", ours[0], *kernels), add_node("Depthwise", ours[1], kernels[0])
        add_node("Separable", ours[2], *kernels), tf.abs(shared)
        add_node("Pointwise", tf.cast(product, tf.float32), kernels[1])
        add_node("Separable", ours[3], *kernels), tf.abs(ours[3])
    nodes = graph.as_graph_def().node
    tensorflow_freeze._take_in_relus_of_x(nodes)
    assert marks(nodes, "relu_x") == [1, 1, 0, 0]
    readers = [name for node in nodes for name in node.input]
    assert [readers.count(name) for name in ("both", "shared", "product", "rounded")] == [0, 2, 1, 1]


def test_a_sum_is_taken_in_where_nothing_else_reads_a_summand_and_sizes_are_equal():
    taken, shapes = {}, {}
    graph = tf.Graph()
    with graph.as_default():
        kernel = tf.ones((4, 4))

        def case(name, shape=(2, 5, 5, 4), other=(2, 5, 5, 4), change=tf.identity, dtype=tf.float32, **attributes):
            x = tf.compat.v1.placeholder(tf.float32, (None, 5, 5, 4))
            y = add_node("Pointwise", x, kernel, **attributes)
            taken[name] = y.op.name
            summands = change(tf.cast(y, dtype)), tf.compat.v1.placeholder(dtype)
            shapes.update(zip((summand.op.name for summand in summands), (shape, other), strict=True))
            return tf.add(*summands), y

        case("first"), case("identity", change=lambda y: tf.identity(tf.identity(y)))
        case("broadcast", other=(2, 1, 5, 4)), case("unknown", None, None), case("one of a batch", other=(1, 5, 5, 4))
        case("rounded", dtype=tf.bfloat16), case("after a ReLU", relu=1)
        tf.abs(case("read twice")[1])
        total, other = case("second")[0], tf.compat.v1.placeholder(tf.float32)
        shapes |= {total.op.name: (2, 5, 5, 4), other.op.name: (2, 5, 5, 4)}
        tf.add(other, total)
    nodes = graph.as_graph_def().node
    named = {node.name: node for node in nodes}
    tensorflow_freeze._take_in_sums(nodes, shapes.get)
    found = {name for name, node in taken.items() if named[node].attr["residuals"].i}
    assert found == {"first", "identity", "second"}
    assert all(len(named[taken[name]].input) == (3 if name in found else 2) for name in taken)


def test_shapes_are_those_of_some_batch():
    def function(x, z):
        return tf.identity(x[:1], name="one"), tf.identity(x, name="all"), tf.identity(z, name="other")

    specs = [tf.TensorSpec((None, 5), tf.float32), tf.TensorSpec((None, None), tf.float32)]
    shape_of = tensorflow_freeze._shapes_of(function, specs)
    assert shape_of("one") == [1, 5] and shape_of("all")[1:] == [5] and shape_of("all:0")[0] > 1
    assert shape_of("other") is None and shape_of("no such node") is None
    of_what_fails = tensorflow_freeze._shapes_of(lambda x, z: tf.reshape(x, (64, 5)), specs)
    assert of_what_fails("all") is None


def pictures():
    return keras.Input((8, 8, 4)), FastSeparableConv2D(4, 3, padding="same", bias_initializer="normal")


def one_of_a_batch_is_added():
    x, layer = pictures()
    return keras.Model(x, keras.layers.Add()([layer(x), keras.layers.Lambda(lambda t: t[:1])(x)]))


def one_of_a_batch_is_convolved():
    x, layer = pictures()
    return keras.Model(x, keras.layers.Add()([layer(keras.layers.Lambda(lambda t: t[:1])(x)), x]))


def a_cast_before_a_layer_changes_values():
    x, layer = pictures()
    return keras.Model(x, layer(keras.ops.cast(keras.ops.cast(keras.layers.ReLU()(x), "bool"), "float32")))


def a_cast_behind_a_layer_changes_values():
    x, layer = pictures()
    return keras.Model(x, keras.layers.ReLU()(keras.ops.cast(keras.ops.cast(layer(x), "bool"), "float32")))


def a_wrapper_holds_the_layer():
    (x, _), layer = pictures(), keras.layers.Conv2D(4, 3)
    wrapped = keras.layers.TimeDistributed(layer)(keras.ops.expand_dims(x, 1))
    return keras.Model(x, [keras.layers.BatchNormalization()(layer(x)), wrapped])


def a_wrapper_holds_the_normalisation():
    (x, layer), norm = pictures(), keras.layers.BatchNormalization()
    return keras.Model(x, [norm(layer(x)), keras.layers.TimeDistributed(norm)(keras.ops.expand_dims(x, 1))])


TRAPS = [
    one_of_a_batch_is_added,
    one_of_a_batch_is_convolved,
    a_cast_before_a_layer_changes_values,
    a_cast_behind_a_layer_changes_values,
    a_wrapper_holds_the_layer,
    a_wrapper_holds_the_normalisation,
]


@pytest.mark.parametrize("build", TRAPS)
def test_what_looks_as_if_it_could_be_taken_in(build, rng):
    model = build()
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) - 0.9 * (w.ndim == 4) for w in model.get_weights()])
    x = rng.standard_normal((3, 8, 8, 4)).astype("float32")
    for frozen, expected in zip(*map(tf.nest.flatten, (fastsepconv.freeze(model)(x), model(x))), strict=True):
        np.testing.assert_allclose(frozen, expected, rtol=1e-4, atol=1e-4)


def residual_model(dtype: str, second_input: bool = False) -> keras.Model:
    """ReLUs before and behind layers, sums behind them, shortcuts: what Xception has, in either order."""

    def made(kind, *arguments, **named):
        return kind(*arguments, dtype=dtype, **named)

    conv, norm, relu, add = keras.layers.Conv2D, keras.layers.BatchNormalization, keras.layers.ReLU, keras.layers.Add
    separable = FastSeparableConv2D
    x = keras.Input((9, 8, 6))
    inputs = [x, keras.Input((9, 8, 6))] if second_input else x
    y = made(relu)(made(norm)(made(conv, 12, 3, padding="same", use_bias=False)(inputs[1] if second_input else x)))
    shortcut = made(norm)(made(conv, 12, 1, padding="same", use_bias=False)(x))
    y = made(add)([made(separable, 12, 3, padding="same")(y), shortcut])
    for order in ("depthwise_pointwise", "pointwise_depthwise"):
        z = made(separable, 12, 3, padding="same", use_bias=False, order=order)(made(relu)(y))
        y = made(add)([y, made(norm)(z)])
    z = made(separable, 20, 3, padding="same")(made(relu)(y))
    z = made(keras.layers.MaxPooling2D, 3, 2, "same")(z)
    return keras.Model(inputs, made(add)([z, made(conv, 20, 1, strides=2, activation="tanh")(y)]))


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
def test_a_model_of_residual_blocks(dtype, rng, frozen_nodes):
    model = residual_model(dtype)
    model.set_weights(
        [rng.uniform(0.2, 0.5, w.shape) * rng.choice([1, 1, 1, -1], w.shape) for w in model.get_weights()]
    )
    for norm in model.layers:
        if isinstance(norm, keras.layers.BatchNormalization):
            norm.moving_variance.assign(rng.uniform(0.5, 2.0, norm.moving_variance.shape))
    frozen, x = fastsepconv.freeze(model), rng.standard_normal((3, 9, 8, 6))
    for batch in (3, 1):
        y, expected = (np.float64(call(x[:batch])) for call in (frozen, model))
        tolerance = {"float32": 1e-5, "float64": 1e-13, "mixed_float16": 0.01}[dtype]
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    if dtype == "mixed_float16":  # sums of halves are rounded to halves: TensorFlow adds them
        assert sum(marks(frozen_nodes, "residuals")) == 0 and sum(marks(frozen_nodes, "relu_x")) == 3
        return
    # Of the sums, that behind the depthwise step of the other order stays, and the last, behind a tanh; of the ReLUs
    # that before its pointwise step.
    assert sum(marks(frozen_nodes, "residuals")) == 2
    assert sum(marks(frozen_nodes, "relu_x")) == 3
    assert len(marks(frozen_nodes, "keep")) == 6
    assert "Rsqrt" not in needed(frozen_nodes)


def test_batches_of_two_inputs_may_be_broadcast(rng):
    model = residual_model("float32", second_input=True)
    x = [rng.standard_normal((batch, 9, 8, 6)).astype("float32") for batch in (3, 1)]
    np.testing.assert_allclose(fastsepconv.freeze(model)(*x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 5, 3), (2, 5, 5, 1), (2, 5, 3), (2, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", ["Pointwise", "Separable"])
def test_a_residual_of_another_shape_is_refused(kind, shape):
    @tf.function(autograph=False)
    def graph(x, residual):
        kernels = [tf.ones((3, 3, 4, 1))] if kind == "Separable" else []
        return add_node(kind, x, *kernels, tf.ones((4, 3)), bias=[tf.ones(3)], residual=[residual])

    x = tf.ones((2, 5, 5, 4))
    assert graph(x, tf.ones((2, 5, 5, 3))).shape == (2, 5, 5, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`residual`\. Expected shape \(2, 5, 5, 3\)"):
        graph(x, tf.ones(shape))


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


POINTWISE = [
    {},
    {"strides": 2},
    {"strides": (1, 3), "padding": "same"},
    {"use_bias": False, "activation": "relu"},
    {"strides": 2, "activation": "gelu", "dilation_rate": 1},
]
OTHERS = [
    {"groups": 2},
    {"kernel_size": (1, 2)},
    {"dtype": "mixed_bfloat16"},
    {"kernel_size": 3, "strides": 2, "padding": "same", "groups": 4},
]


@pytest.mark.parametrize("arguments", [*POINTWISE, *OTHERS], ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
def test_convolutions_of_one_pixel_are_computed_here(with_norm, arguments, rng, frozen_nodes):
    layers = [keras.layers.Conv2D(**{"filters": 8, "kernel_size": 1} | arguments)]
    layers += [keras.layers.BatchNormalization(dtype=arguments.get("dtype"))] if with_norm else []
    model = keras.Sequential([keras.Input((7, 8, 12)), *layers])
    model.set_weights(
        [rng.uniform(0.5, 1.5, weight.shape) - 0.7 * (weight.ndim == 4) for weight in model.get_weights()]
    )
    x = rng.standard_normal((2, 7, 8, 12)).astype("float32")
    y, expected = (np.float64(call(x)) for call in (fastsepconv.freeze(model), model))
    tolerance = 2.0**-6 if "dtype" in arguments else 1e-5
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert len(marks(frozen_nodes, "keep")) == (arguments in POINTWISE)
    assert ("Rsqrt" in needed(frozen_nodes)) == (with_norm and "activation" in arguments)


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
