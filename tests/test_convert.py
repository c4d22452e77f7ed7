"""convert and revert: the layers change, everything else stays."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from fastsepconv import FastDepthwiseConv2D, FastSeparableConv2D, convert, revert
from fastsepconv.copying import layers_of
from tests.tolerances import RELATIVE

FAST = (FastSeparableConv2D, FastDepthwiseConv2D)
STOCK = (keras.layers.SeparableConv2D, keras.layers.DepthwiseConv2D)


def batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype="float32")


def counts(model: keras.Model) -> tuple[int, int]:
    """How many fast and how many stock layers a model holds."""
    types = [type(layer) for layer in layers_of(model)]
    return sum(t in FAST for t in types), sum(t in STOCK for t in types)


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.SeparableConv2D(4, 3, activation="relu", depth_multiplier=2),
            keras.layers.BatchNormalization(),
            keras.layers.DepthwiseConv2D(3, strides=2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ],
        name="small",
    )


def with_shared_layers() -> keras.Model:
    a, b = keras.Input((12, 12, 3), name="a"), keras.Input((12, 12, 3), name="b")
    shared = keras.layers.SeparableConv2D(3, 3, padding="same", name="shared")
    joined = keras.layers.Concatenate()([shared(a), shared(shared(b))])
    return keras.Model({"a": a, "b": b}, {"y": joined, "z": keras.layers.DepthwiseConv2D(3)(a)})


def nested() -> keras.Model:
    inputs = keras.Input((12, 12, 3))
    inner = keras.Sequential(
        [keras.Input((12, 12, 3)), keras.layers.SeparableConv2D(3, 3, padding="same")], name="inner"
    )
    middle_input = keras.Input((12, 12, 3))
    middle = keras.Model(middle_input, inner(inner(middle_input)), name="middle")
    return keras.Model(inputs, [middle(inputs), inner(inputs)])


def with_wrappers() -> keras.Model:
    inputs = keras.Input((4, 12, 12, 3))
    conv = keras.layers.SeparableConv2D(2, 3, name="in_time")
    x = keras.layers.TimeDistributed(conv)(inputs)
    first = conv(inputs[:, 0])
    model = keras.Sequential([keras.Input((10, 10, 2)), keras.layers.DepthwiseConv2D(3), keras.layers.Flatten()])
    x = keras.layers.TimeDistributed(model)(x)
    x = keras.layers.Bidirectional(keras.layers.GRU(3))(x)
    return keras.Model(inputs, [x, first])


def on_two_policies() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.SeparableConv2D(4, 3, dtype="mixed_bfloat16"),
            keras.layers.DepthwiseConv2D(3, dtype="float64"),
        ]
    )


MODELS = {
    sequential: (2, {"": (2, 12, 12, 3)}),
    with_shared_layers: (2, {"a": (2, 12, 12, 3), "b": (2, 12, 12, 3)}),
    nested: (1, {"": (2, 12, 12, 3)}),
    with_wrappers: (2, {"": (2, 4, 12, 12, 3)}),
    on_two_policies: (2, {"": (2, 12, 12, 3)}),
}


def inputs_of(shapes: dict):
    arrays = {name: batch(*shape) for name, shape in shapes.items()}
    return arrays.get("", arrays)


def assert_same_outputs(model: keras.Model, other: keras.Model, x) -> None:
    dtypes = {layer.compute_dtype for layer in model.layers}
    tolerance = RELATIVE["bfloat16" if "bfloat16" in dtypes else "float32"]
    for a, b in zip(keras.tree.flatten(model(x)), keras.tree.flatten(other(x)), strict=True):
        np.testing.assert_allclose(a, b, atol=4 * tolerance)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_there_and_back(make, in_place):
    layers, shapes = MODELS[make]
    model = make()
    config, names = model.get_config(), [weight.name for weight in model.weights]
    weights, before = model.get_weights(), [np.array(y) for y in keras.tree.flatten(model(inputs_of(shapes)))]
    fast = convert(model, in_place=in_place)
    assert (fast is model) == in_place
    assert counts(fast) == (layers, 0)
    if not in_place:
        assert counts(model) == (0, layers)
        assert_same_outputs(fast, model, inputs_of(shapes))
    assert [weight.name for weight in fast.weights] == names
    for a, b in zip(fast.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    back = revert(fast, in_place=in_place)
    assert counts(back) == (0, layers)
    assert back.get_config() == config
    after = keras.tree.flatten(back(inputs_of(shapes)))
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_copy_shares_nothing_with_the_original():
    model = sequential()
    before = model.get_weights()
    fast = convert(model)
    fast.set_weights([weight + 1 for weight in before])
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_shared_layers_stay_shared():
    fast = convert(with_wrappers())
    wrapper = next(layer for layer in fast.layers if isinstance(layer, keras.layers.TimeDistributed))
    assert wrapper.layer is fast.get_layer("in_time")
    fast = convert(nested())
    assert fast.get_layer("middle").get_layer("inner") is fast.get_layer("inner")


@pytest.mark.parametrize("in_place", [False, True])
def test_trainable_flags_stay(in_place):
    model = sequential()
    model.trainable = False
    model.layers[0].trainable = True
    flags = [layer.trainable for layer in layers_of(model)]
    fast = convert(model, in_place=in_place)
    assert [layer.trainable for layer in layers_of(fast)] == flags
    assert [v.path for v in fast.trainable_variables] == [v.path for v in model.trainable_variables]


@pytest.mark.parametrize("in_place", [False, True])
def test_training_goes_on_where_it_was(in_place):
    x, y = batch(8, 12, 12, 3), batch(8, 2)
    keras.utils.set_random_seed(0)
    model, twin = sequential(), sequential()
    twin.set_weights(model.get_weights())
    for each in (model, twin):
        each.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
        each.fit(x, y, epochs=3, verbose=0)
    fast = convert(model, in_place=in_place)
    assert int(fast.optimizer.iterations) == 3
    logs = [each.fit(x, y, epochs=3, verbose=0).history for each in (fast, twin)]
    assert logs[0].keys() == logs[1].keys()
    for key in logs[0]:
        np.testing.assert_allclose(logs[0][key], logs[1][key], rtol=1e-3)
    np.testing.assert_allclose(fast.predict(x, verbose=0), twin.predict(x, verbose=0), atol=1e-3)


def test_functions_traced_before_are_forgotten():
    class Doubling(FastDepthwiseConv2D):
        def call(self, inputs):
            return 2 * super().call(inputs)

    model = sequential()
    x = batch(2, 12, 12, 3)
    single = model.predict(x, verbose=0)
    convert(model, in_place=True)
    object.__setattr__(model.layers[2], "__class__", Doubling)
    assert np.abs(model.predict(x, verbose=0) - single).max() > 1e-3


def test_xla_is_turned_off_where_it_was_on():
    model = sequential()
    model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile
    assert not convert(model).jit_compile
    assert model.jit_compile


def test_a_model_never_built_changes_too():
    layers = [keras.layers.SeparableConv2D(2, 3), keras.layers.DepthwiseConv2D(3)]
    model = keras.Sequential(layers)
    x = batch(2, 8, 8, 3)
    convert(model, in_place=True)
    assert model(x).shape == (2, 4, 4, 2)
    fast = keras.Sequential([FastSeparableConv2D(2, 3), FastDepthwiseConv2D(3)])
    assert revert(fast, in_place=True)(x).shape == (2, 4, 4, 2)
    assert counts(fast) == (0, 2)


class Block(keras.layers.Layer):
    """A layer of the user's own that is not registered with Keras."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.convs = [keras.layers.SeparableConv2D(filters, 3, padding="same") for _ in range(2)]

    def build(self, input_shape):
        for conv in self.convs:
            conv.build(input_shape)
            input_shape = conv.compute_output_shape(input_shape)

    def call(self, inputs):
        return self.convs[1](self.convs[0](inputs))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


def test_layers_of_the_users_own_are_looked_into():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, Block(4)(inputs))
    fast = convert(model)
    assert counts(fast) == (2, 0)
    assert_same_outputs(fast, model, batch(2, 8, 8, 3))


def mean_cube(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** 3, axis=-1)


def softsign_of_half(x):
    return keras.ops.softsign(x / 2)


class Halving(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return keras.ops.full(shape, 0.5, dtype)


def test_functions_of_the_users_own_stay():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.SeparableConv2D(2, 3, activation=softsign_of_half, bias_initializer=Halving())(inputs)
    x = keras.layers.Lambda(lambda x: np.float32(2.0) * keras.ops.mean(x, axis=(1, 2)))(x)
    model = keras.Model(inputs, keras.ops.transpose(x) + 1.0)
    model.compile("sgd", mean_cube, metrics=[mean_cube, "mae"])
    fast = convert(model)
    assert fast.layers[1].activation is softsign_of_half
    assert fast.loss is mean_cube
    assert_same_outputs(fast, model, batch(2, 8, 8, 3))


class Network(keras.Model):
    """A subclassed model that Keras cannot save: its constructor takes a layer."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def call(self, inputs):
        return self.conv(inputs)

    def get_config(self):
        raise NotImplementedError("no configuration")


def test_a_subclassed_model_is_converted_in_place():
    model = Network(keras.layers.SeparableConv2D(2, 3))
    x = batch(2, 8, 8, 3)
    before = model(x)
    with pytest.raises(ValueError, match=r"argument `model`.*in_place=True.*no configuration"):
        convert(model)
    assert convert(model, in_place=True) is model
    assert counts(model) == (1, 0)
    np.testing.assert_allclose(model(x), before, atol=1e-5)


def test_subclasses_of_the_stock_layers_stay():
    @keras.saving.register_keras_serializable("tests")
    class Halving(keras.layers.SeparableConv2D):
        def call(self, inputs):
            return super().call(inputs) / 2

    model = keras.Sequential([keras.Input((8, 8, 3)), Halving(2, 3), keras.layers.DepthwiseConv2D(3)])
    fast = convert(model)
    assert [type(layer) for layer in fast.layers] == [Halving, FastDepthwiseConv2D]


def test_says_that_there_is_nothing_to_convert():
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
    with pytest.warns(UserWarning, match="convert changed nothing"):
        convert(model)


def test_does_not_revert_an_order_that_keras_has_not():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), FastSeparableConv2D(2, 3, order="pointwise_depthwise", name="mixed_first")]
    )
    with pytest.raises(ValueError, match=r'order="pointwise_depthwise" in mixed_first'):
        revert(model)


@pytest.mark.parametrize("function", [convert, revert])
def test_takes_keras_models_only(function):
    with pytest.raises(TypeError, match=r"argument `model`. Expected a keras.Model. Received: model='xception'"):
        function("xception")


def test_the_whole_of_keras_applications_xception(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.applications.Xception(weights=None, input_shape=(71, 71, 3), classes=10)
    fast = convert(model)
    assert counts(fast) == (34, 0)
    assert [layer.name for layer in fast.layers] == [layer.name for layer in model.layers]
    x = batch(2, 71, 71, 3)
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(fast.predict(x, verbose=0), expected, atol=1e-4)
    fast.save_weights(tmp_path / "xception.weights.h5")
    model.set_weights([0 * weight for weight in model.get_weights()])
    model.load_weights(tmp_path / "xception.weights.h5")
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
