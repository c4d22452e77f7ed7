"""What frozen models take into this package's nodes, and what must stay: ReLUs, sums, convolutions of one pixel."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow_freeze
from fastsepconv.layers import FastSeparableConv2D

from .cases import add_node
from .frozen import frozen_nodes, marks, needed

__all__ = ["frozen_nodes"]


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
    def graph(x, *residual):
        kernels = [tf.ones((3, 3, 4, 1))] if kind == "Separable" else []
        return add_node(kind, x, *kernels, tf.ones((4, 3)), bias=[tf.ones(3)], residual=residual)

    x = tf.ones((2, 5, 5, 4))
    assert graph(x, tf.ones((2, 5, 5, 3))).shape == (2, 5, 5, 3)
    expected = r"`residual`\. Expected one of shape \(2, 5, 5, 3\).*Received: "
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{expected}1 of {len(shape)} dimensions"):
        graph(x, tf.ones(shape))
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{expected}2 of 4 dimensions"):
        graph(x, *[tf.ones((2, 5, 5, 3))] * 2)


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
