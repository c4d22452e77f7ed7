"""The Keras layers have Keras's own arguments, configuration, errors, weights and results."""

from __future__ import annotations

import inspect
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.testing import TestCase

from fastsepconv import FastDepthwiseConv2D, FastSeparableConv2D, layers
from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import resolve
from fastsepconv.models import pointwise_then_depthwise
from tests.tolerances import RELATIVE, assert_close, assert_no_worse

PAIRS = [
    pytest.param(FastSeparableConv2D, keras.layers.SeparableConv2D, {"filters": 5}, id="separable"),
    pytest.param(FastDepthwiseConv2D, keras.layers.DepthwiseConv2D, {}, id="depthwise"),
]
ARGUMENTS = [
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "strides": 2, "padding": "same", "depth_multiplier": 2, "activation": "relu"},
    {"kernel_size": [3, 2], "dilation_rate": (2, 1), "use_bias": False, "data_format": "channels_first"},
    {
        "kernel_size": 3,
        "padding": "SAME",
        "depthwise_initializer": "he_normal",
        "bias_initializer": keras.initializers.Constant(0.5),
        "depthwise_regularizer": "l2",
        "bias_regularizer": keras.regularizers.L1(0.1),
        "activity_regularizer": "l2",
        "depthwise_constraint": "non_neg",
        "bias_constraint": keras.constraints.MaxNorm(2.0),
        "activation": keras.activations.gelu,
        "dtype": "mixed_bfloat16",
        "trainable": False,
        "name": "conv",
    },
]
POINTWISE_FIRST = {"filters": 3, "kernel_size": 3, "depth_multiplier": 2, "order": "pointwise_depthwise"}


def image(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def twins(fast: type, stock: type, shape: tuple, **arguments):
    """A fast and a stock layer, built for `shape`, with the same weights, the bias not zero."""
    pair = fast(**arguments), stock(**arguments)
    random = np.random.default_rng(1)
    for layer in pair:
        layer.build(shape)
    values = [random.standard_normal(weight.shape).astype(weight.dtype) for weight in pair[0].weights]
    for layer in pair:
        layer.set_weights(values)
    return pair


def outputs_and_gradients(layer: keras.Layer, x: np.ndarray, run=lambda function: function) -> list[tf.Tensor]:
    x = tf.convert_to_tensor(x)

    @run
    def compute():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
            loss = tf.reduce_sum(tf.cast(y, "float64") * image(*y.shape, dtype="float64"))
        return [y, *tape.gradient(loss, [x, *layer.trainable_variables])]

    return compute()


def assert_equal_in_all(layer: keras.Layer, ours: list, theirs: list, true: list) -> None:
    """Hold the output and every gradient to float64, and all of them together to Keras's own error."""
    names = ["y", "d_x", *(f"d_{weight.name}" for weight in layer.trainable_weights)]
    for name, our, exact in zip(names, ours, true, strict=True):
        assert_close(name, our.numpy(), exact)
    if layer.compute_dtype != "float64":
        assert_no_worse(ours, theirs, true)


@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_has_the_arguments_of_keras(fast, stock, extra):
    def arguments(cls):
        return [(p.name, p.default, p.kind) for p in inspect.signature(cls).parameters.values() if p.name != "order"]

    assert arguments(fast) == arguments(stock)


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_has_the_configuration_and_weights_of_keras(fast, stock, extra, arguments):
    arguments = {"name": "layer", **extra, **arguments}
    ours, theirs = fast(**arguments), stock(**arguments)
    assert ours.get_config() == theirs.get_config()
    for layer in (ours, theirs):
        layer.build((None, 9, 9, 9))
    described = [[(w.path, w.shape, w.dtype, w.trainable) for w in layer.weights] for layer in (ours, theirs)]
    assert described[0] == described[1]
    assert ours.compute_output_shape((4, 9, None, 9)) == theirs.compute_output_shape((4, 9, None, 9))


@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_is_named_as_keras_names_its_layer(fast, stock, extra):
    keras.backend.clear_session()
    ours = [fast(**extra, kernel_size=3).name for _ in range(2)]
    keras.backend.clear_session()
    assert ours == [stock(**extra, kernel_size=3).name for _ in range(2)]
    assert repr(fast(**extra, kernel_size=3, name="n")) == f"<{fast.__qualname__} name=n, built=False>"
    assert pickle.loads(pickle.dumps(fast)) is fast


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_size": 0},
        {"kernel_size": (3, 3, 3)},
        {"kernel_size": 3, "strides": 0},
        {"kernel_size": 3, "strides": "two"},
        {"kernel_size": 3, "strides": 2, "dilation_rate": 2},
        {"kernel_size": 3, "dilation_rate": -1},
        {"kernel_size": 3, "depth_multiplier": 0},
        {"kernel_size": 3, "filters": -1},
        {"kernel_size": 3, "padding": "causal"},
        {"kernel_size": 3, "padding": ((1, 1), (1, 1))},
        {"kernel_size": 3, "data_format": "NHWC"},
        {"kernel_size": 3, "activation": "no such function"},
        {"kernel_size": 3, "trainable": "yes"},
        {"kernel_size": 3, "order_of_things": 1},
        {"kernel_size": 3, "input": (None, 2, 9, 3)},
        {"kernel_size": 3, "input": (None, 9, 9)},
        {"kernel_size": 3, "input": (None, 9, 9, 9, 3)},
        {"kernel_size": 3, "input": (None, 9, 9, None)},
    ],
    ids=str,
)
@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_raises_what_keras_raises(fast, stock, extra, wrong):
    def error_of(cls):
        arguments = {"name": "layer", **extra, **wrong}
        shape = arguments.pop("input", (None, 9, 9, 3))
        try:
            cls(**arguments)(keras.Input(batch_shape=shape, name="images"))
        except Exception as error:
            return type(error), str(error)

    assert error_of(fast) == error_of(stock)


@pytest.mark.parametrize("wrong", [(2, 9, 9), (2, 9, 9, 4)], ids=["rank", "channels"])
def test_refuses_an_input_that_does_not_fit_its_weights(wrong):
    layer = FastSeparableConv2D(5, 3)
    layer.build((None, 9, 9, 3))
    with pytest.raises(ValueError, match="is incompatible with the layer"):
        layer(image(*wrong))


def test_refuses_an_unknown_order():
    with pytest.raises(ValueError, match=r"argument `order`.*Received: order='depthwise'"):
        FastSeparableConv2D(5, 3, order="depthwise")


RUNS = {"eager": lambda function: function, "graph": tf.function}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": "same", "strides": 2, "activation": "relu"},
        {"kernel_size": (1, 4), "padding": "same", "dilation_rate": (1, 2), "depth_multiplier": 3},
        {"kernel_size": 3, "use_bias": False, "activation": "softmax"},
        {"kernel_size": 2, "dtype": "float64"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_computes_what_keras_computes(fast, stock, extra, arguments, run):
    shape = (2, 7, 9, 8)
    arguments = {**extra, **arguments}
    dtype = arguments.get("dtype", "float32")
    ours, theirs = twins(fast, stock, shape, **arguments)
    _, exact = twins(fast, stock, shape, **arguments | {"dtype": "float64"})
    exact.set_weights(ours.get_weights())
    x = image(*shape, dtype=dtype)
    true = outputs_and_gradients(exact, x.astype("float64"))
    results = [outputs_and_gradients(layer, x, RUNS[run]) for layer in (ours, theirs)]
    assert_equal_in_all(ours, *results, true)


def test_strides_may_differ_where_tensorflow_wants_them_equal():
    layer = FastDepthwiseConv2D(3, strides=(2, 1), padding="same", dtype="float64")
    x = image(2, 7, 9, 4, dtype="float64")
    y = layer(x)
    kernel, bias = layer.get_weights()
    geometry = resolve(x.shape, kernel.shape, (2, 1), "same", (1, 1))
    assert_close("y", y.numpy(), reference.depthwise_forward(geometry, x, kernel, bias))
    assert y.shape == layer.compute_output_shape(x.shape)


CHANNELS_FIRST = [
    (FastSeparableConv2D, {"filters": 5, "kernel_size": 3, "strides": 2}),
    (FastSeparableConv2D, {**POINTWISE_FIRST, "padding": "same"}),
    (FastDepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2}),
]


@pytest.mark.parametrize(("cls", "arguments"), CHANNELS_FIRST, ids=str)
def test_takes_channels_first(cls, arguments):
    last, first = cls(**arguments), cls(**arguments, data_format="channels_first")
    x = image(2, 9, 7, 4)
    expected = last(x)
    first.build((None, 4, 9, 7))
    first.set_weights(last.get_weights())
    y = first(x.transpose(0, 3, 1, 2))
    assert y.shape == first.compute_output_shape((2, 4, 9, 7))
    np.testing.assert_array_equal(tf.transpose(y, (0, 2, 3, 1)), expected)


@pytest.mark.parametrize("activation", ["relu", None])
def test_pointwise_first_computes_what_two_stock_layers_compute(activation):
    options = {"strides": 2, "padding": "same", "activation": activation}
    ours = FastSeparableConv2D(**POINTWISE_FIRST, **options)
    theirs = pointwise_then_depthwise(3, 3, depth_multiplier=2, **options)
    exact = pointwise_then_depthwise(3, 3, depth_multiplier=2, dtype="float64", **options)
    x = image(2, 9, 7, 4)
    for layer in (ours, theirs, exact):
        layer.build(x.shape)
    ours.bias.assign([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    theirs.set_weights(ours.get_weights())
    exact.set_weights(ours.get_weights())
    true = outputs_and_gradients(exact, x.astype("float64"))
    assert_equal_in_all(ours, outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), true)


def test_pointwise_first_has_its_own_shapes():
    layer = FastSeparableConv2D(**POINTWISE_FIRST)
    layer.build((None, 9, 9, 4))
    assert {weight.name: weight.shape for weight in layer.weights} == {
        "pointwise_kernel": (1, 1, 4, 3),
        "depthwise_kernel": (3, 3, 3, 2),
        "bias": (6,),
    }
    assert layer.compute_output_shape((None, 9, None, 4)) == (None, 7, None, 6)
    assert layer.get_config()["order"] == "pointwise_depthwise"
    assert "order" not in FastSeparableConv2D(5, 3).get_config()


@pytest.mark.parametrize(
    ("cls", "arguments", "shape"),
    [
        (FastSeparableConv2D, {"filters": 5, "kernel_size": 2, "depth_multiplier": 5}, (3, 4, 4, 5)),
        (FastSeparableConv2D, {"filters": 6, "kernel_size": 2, "padding": "same", "dilation_rate": 2}, (3, 5, 5, 6)),
        (FastSeparableConv2D, POINTWISE_FIRST, (3, 3, 3, 6)),
        (FastDepthwiseConv2D, {"kernel_size": 2, "depth_multiplier": 5, "strides": 2}, (3, 2, 2, 20)),
        (FastDepthwiseConv2D, {"kernel_size": 3, "activation": "relu", "use_bias": False}, (3, 3, 3, 4)),
    ],
    ids=str,
)
def test_passes_keras_own_test_of_a_layer(cls, arguments, shape):
    TestCase().run_layer_test(
        cls,
        init_kwargs=arguments,
        input_shape=(3, 5, 5, 4),
        expected_output_shape=shape,
        expected_num_losses=0,
        supports_masking=False,
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
@pytest.mark.parametrize(("fast", "stock", "extra"), PAIRS)
def test_follows_the_dtype_policy(fast, stock, extra, policy):
    ours, theirs = twins(fast, stock, (2, 6, 6, 4), kernel_size=3, dtype=policy, **extra)
    x = image(2, 6, 6, 4)
    results = list(zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True))
    for our, their in results:
        assert our.dtype == their.dtype
        scale = float(np.abs(their).max())
        np.testing.assert_allclose(our, their, atol=4 * RELATIVE[ours.compute_dtype] * scale, rtol=0)


def test_a_subclass_keeps_its_own_name_and_call():
    class Doubling(FastSeparableConv2D):
        def call(self, inputs):
            return 2 * super().call(inputs)

    layer = Doubling(2, 3)
    x = image(1, 5, 5, 3)
    assert layer.name.startswith("doubling")
    np.testing.assert_allclose(layer(x), 2 * FastSeparableConv2D.call(layer, tf.constant(x)), rtol=1e-6)


@pytest.mark.parametrize("steps", [3, None])
def test_works_inside_time_distributed(steps):
    inputs = keras.Input((steps, 6, 6, 2))
    model = keras.Model(inputs, keras.layers.TimeDistributed(FastSeparableConv2D(4, 3))(inputs))
    x = image(2, 3, 6, 6, 2)
    layer = model.layers[1].layer
    each = np.stack([layer(x[:, step]) for step in range(3)], axis=1)
    np.testing.assert_allclose(model.predict(x, verbose=0), each, atol=1e-5)


def test_an_empty_batch_gives_an_empty_output_and_no_gradient():
    layer = FastSeparableConv2D(4, 3)
    y, d_x, *d_weights = outputs_and_gradients(layer, image(0, 6, 6, 2))
    assert (y.shape, d_x.shape) == ((0, 4, 4, 4), (0, 6, 6, 2))
    assert all(not np.any(gradient) for gradient in d_weights)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [(FastSeparableConv2D, {"filters": 4}), (FastSeparableConv2D, POINTWISE_FIRST), (FastDepthwiseConv2D, {})],
    ids=str,
)
def test_without_kernels_for_the_backend_keras_computes_and_says_so_once(monkeypatch, cls, arguments):
    layer = cls(**{"kernel_size": 3, **arguments})
    x = image(2, 6, 6, 2)
    expected = layer(x)
    monkeypatch.setattr(layers.bridge, "for_backend", lambda name: None)
    layers._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no kernels for Keras's 'tensorflow' backend") as caught:
            y = [layer(x), layer(x)]
    finally:
        layers._kernels.cache_clear()
    assert len(caught) == 1
    np.testing.assert_allclose(y, [expected, expected], atol=1e-5)
