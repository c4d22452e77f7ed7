"""TensorFlow's ops on a card: run on one, and in Numba's simulator with `exchanged_devices`.

Nothing here may be computed elsewhere: results lie on the card, and the CUDA kernels have run.
"""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.bridge import tensorflow_card, tensorflow_numpy
from fastsepconv.bridge.tensorflow_capi import RESOURCE_EXHAUSTED
from fastsepconv.bridge.tensorflow_registration import CARD
from fastsepconv.kernels.cuda import launch, memory
from fastsepconv.models import xception
from tests.bridge import oracle
from tests.bridge.cases import KINDS, WINDOWS, add_node, assert_second_order, gradients, operands, window_of
from tests.bridge.frozen import frozen_nodes, marks, needed
from tests.tolerances import assert_close

__all__ = ["frozen_nodes"]

MEMORY = {"memory_limit": 8192} if CARD == "GPU" else {}  # megabytes
(DEVICE, *_) = tf.config.list_physical_devices(CARD) or [None]
if DEVICE is None:
    pytest.skip("TensorFlow sees no GPU", allow_module_level=True)
# Two devices on one card, for a strategy.
tf.config.set_logical_device_configuration(DEVICE, [tf.config.LogicalDeviceConfiguration(**MEMORY)] * 2)


@pytest.fixture(autouse=True, params=["auto", "cuda"])
def backend(request, monkeypatch):
    """Both take tensors where they are; no NumPy array is made of one."""

    def refuse(*arguments, **named):
        raise AssertionError("tensors were copied")

    monkeypatch.setattr(tensorflow_numpy, "forward", refuse)
    fastsepconv.set_backend(request.param)
    yield request.param
    fastsepconv.set_backend("auto")


@pytest.fixture(autouse=True)
def ran():
    """The names of the CUDA kernels that ran."""
    names: list[str] = []
    launch.listeners.append(names.append)
    yield names
    launch.listeners.remove(names.append)


@pytest.fixture
def lent(monkeypatch):
    """The memory that TensorFlow lent for the kernels' own use: [handle, ...], what was given back taken out."""
    api, handles = tensorflow_card._apis[0], []
    allocate, delete = api.AllocateTemp, api.DeleteTensor

    def lend(*arguments):
        handles.append(allocate(*arguments))
        lend.times += 1
        return handles[-1]

    def take_back(handle):
        if handle in handles:
            handles.remove(handle)
        delete(handle)

    lend.times = 0
    monkeypatch.setattr(api, "AllocateTemp", lend)
    monkeypatch.setattr(api, "DeleteTensor", take_back)
    return handles, lend


def on_card(tensor) -> bool:
    return tf.DeviceSpec.from_string(tensor.device).device_type == CARD


def steps_of(kind):
    return {"depthwise", "pointwise"} if kind == "separable" else {kind}


def test_the_bridge_says_which_way_it_takes(backend):
    status = bridge.status()
    assert status["path"] == "c-api" and "computed where they are" in status["reason"]
    assert status["backend"] == ("cuda" if backend == "cuda" else "cpu")


def test_a_frozen_model(rng, ran, frozen_nodes):
    """ReLUs before and behind a convolution are computed by its node, a sum by TensorFlow."""
    image = keras.Input((5, 6, 4))
    y = fastsepconv.FastSeparableConv2D(8, 3, padding="same")(keras.layers.ReLU()(image - 0.5))
    y = keras.layers.Add()([keras.layers.BatchNormalization()(y), keras.layers.Conv2D(8, 1)(image)])
    y = keras.layers.ReLU()(fastsepconv.FastSeparableConv2D(8, 3)(y))
    model = keras.Model(image, y)
    low = {1: 0.1, 4: -1.0}  # of what has one size, for one the variances
    model.set_weights([rng.uniform(low[weight.ndim], 1, weight.shape) for weight in model.get_weights()])
    x = rng.standard_normal((2, 5, 6, 4)).astype("float32")
    y = fastsepconv.freeze(model)(x).numpy()
    assert ran and 0 < np.count_nonzero(y) < y.size
    assert "Relu" not in needed(frozen_nodes) and sum(marks(frozen_nodes, "residuals")) == 0
    np.testing.assert_allclose(y, fastsepconv.revert(model)(x), rtol=1e-4, atol=1e-5)


def test_what_was_frozen_for_the_cpu_is_refused():
    @tf.function(autograph=False)
    def graph(x):
        return add_node("Pointwise", x, tf.ones((4, 4)), residual=[x])

    with pytest.raises(tf.errors.UnimplementedError, match="frozen for the CPU does not run on a card"):
        graph(tf.ones((1, 5, 5, 4)))


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_and_gradients_are_tensorflows(dtype, window, kind, in_graph, rng, ran):
    *sizes, options = window
    inputs = operands(rng, kind, *sizes, dtype=dtype)
    options = window_of(kind, options)

    def ours(*inputs):
        return gradients(lambda *inputs: KINDS[kind](*inputs, **options), inputs)

    y, found = (tf.function(ours) if in_graph else ours)(*inputs)
    doubles = [tf.cast(tensor, tf.float64) for tensor in inputs]
    true, expected = gradients(lambda *inputs: oracle.convolve(kind, inputs[:-1], inputs[-1], **options), doubles)
    for name, our, their in zip(("y", "dx", "1", "2", "3"), (y, *found), (true, *expected), strict=False):
        assert our.dtype == dtype and on_card(our)
        assert_close(f"{kind} {name}", our.numpy(), their.numpy())
    assert any(dtype in name for name in ran)
    if dtype == "float64":  # of which there are plain kernels only
        assert {name.partition("_")[0] for name in ran} >= steps_of(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_are_tensorflows(kind, rng):
    assert_second_order(kind, rng)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_computed_in_float32(dtype, rng, ran):
    inputs = [tf.cast(tensor, dtype) for tensor in operands(rng, "separable", *WINDOWS["same"][:-1])]
    y, found = gradients(lambda *inputs: bridge.separable_conv2d(*inputs, padding="same"), inputs)
    doubles = [tf.cast(tensor, tf.float64) for tensor in inputs]
    true, expected = gradients(lambda *ds: oracle.convolve("separable", ds[:-1], ds[-1], padding="same"), doubles)
    for our, their in zip((y, *found), (true, *expected), strict=True):
        assert our.dtype == dtype
        assert_close("half", our.numpy(), their.numpy())
    assert ran and all(dtype not in name for name in ran)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_first(kind, rng):
    inputs = operands(rng, kind, *WINDOWS["plain"][:-1])
    first = tf.transpose(inputs[0], (0, 3, 1, 2))
    y = KINDS[kind](first, *inputs[1:], data_format="channels_first")
    true = oracle.convolve(kind, inputs[:-1], inputs[-1])
    assert_close("y", tf.transpose(y, (0, 2, 3, 1)).numpy(), true.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind, rng):
    inputs = operands(rng, kind, (0, 5, 6, 3), (3, 3), 1, 4)
    y, (dx, *others) = gradients(KINDS[kind], inputs)
    assert y.shape[0] == 0 and dx.shape == (0, 5, 6, 3)
    for gradient in others:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_computed(kind, rng, ran):
    inputs = operands(rng, kind, *WINDOWS["plain"][:-1])
    with tf.GradientTape() as tape:
        tape.watch(inputs[1])
        y = KINDS[kind](*inputs)
    ran.clear()
    assert tape.gradient(y, inputs[1]).shape == inputs[1].shape
    last = sorted(steps_of(kind))[0]
    assert f"{last}_d_kernel[float64,float64]" in ran
    assert not any(name.startswith((f"{last}_d_x", "row_sums")) for name in ran)


def test_what_tensorflow_put_into_its_stream_before_is_waited_for(rng):
    """And what comes after finds the result: a long chain of TensorFlow's own work on both sides."""
    batch, channels, rounds = (64, 256, 12) if CARD == "GPU" else (1, 16, 3)
    kernel = tf.constant(rng.standard_normal((channels, channels)) / channels**0.5)
    x = tf.constant(rng.standard_normal((batch, 8, 8, channels)))
    exact, ours = x.numpy().reshape(-1, channels), x
    for _ in range(rounds):
        ours = tf.tanh(tf.reshape(tf.reshape(ours, (-1, channels)) @ kernel, x.shape))
        ours = tf.tanh(bridge.pointwise_conv2d(ours, kernel))
        exact = np.tanh(np.tanh(exact @ kernel.numpy()) @ kernel.numpy())
    assert_close("y", ours.numpy().reshape(exact.shape), exact)


def test_the_kernels_own_memory_is_tensorflows_and_is_given_back(rng, lent, monkeypatch):
    handles, lend = lent
    inputs = operands(rng, "separable", *WINDOWS["plain"][:-1])
    gradients(KINDS["separable"], inputs)
    # mid; then mid again, d_mid, and what the sums over pixels are made of: d_pointwise, d_bias, d_depthwise
    assert lend.times == 1 + 5 and handles == []

    def refused(*arguments):
        raise RuntimeError("The card is on fire.")

    monkeypatch.setattr(launch.Kernel, "__call__", refused)
    with pytest.raises(tf.errors.InternalError, match=r"The card is on fire\."):
        KINDS["separable"](*inputs)
    assert lend.times == 7 and handles == []
    assert getattr(memory._lent, "room", None) is None


def test_no_memory_is_an_error_and_tensorflow_goes_on(rng, monkeypatch):
    inputs = operands(rng, "separable", *WINDOWS["plain"][:-1])
    api = tensorflow_card._apis[0]

    def refuse(*arguments):
        api.SetStatus(arguments[-1], RESOURCE_EXHAUSTED, b"There is no room.")

    with monkeypatch.context() as patch:
        patch.setattr(api, "AllocateTemp", refuse)
        with pytest.raises(tf.errors.ResourceExhaustedError, match="There is no room"):
            KINDS["separable"](*inputs)
    assert_close("y", KINDS["separable"](*inputs).numpy(), oracle.convolve("separable", inputs[:-1], inputs[-1]))


def test_an_interrupt_cancels_the_operation(rng, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    inputs = operands(rng, "pointwise", *WINDOWS["plain"][:-1])
    with monkeypatch.context() as patch:
        patch.setattr(launch.Kernel, "__call__", interrupted)
        with pytest.raises(tf.errors.CancelledError, match="KeyboardInterrupt"):
            KINDS["pointwise"](*inputs)
    assert KINDS["pointwise"](*inputs).shape == (2, 6, 7, 6)


WRONG = {
    "channels": ("separable", 1, lambda kernel: kernel[:, :, :-1], "`depthwise_kernel`. Expected 5 input channels"),
    "filters": ("separable", 2, lambda kernel: kernel[:, :, :-1], "`pointwise_kernel`. Expected 5 input channels"),
    "bias": ("depthwise", 2, lambda bias: bias[:-1], "`bias`. Expected 5 elements"),
    "rank": ("pointwise", 0, lambda x: x[0], "`x`. Expected 4 dimensions"),
    "size": ("depthwise", 0, lambda x: x[:, :1, :1], "`depthwise_kernel`. Expected a kernel that fits"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_are_told_when_a_graph_runs(wrong, rng):
    kind, position, spoil, message = WRONG[wrong]
    inputs = operands(rng, kind, *WINDOWS["plain"][:-1])
    unknown = tf.function(KINDS[kind], input_signature=[tf.TensorSpec(None, tf.float64)] * len(inputs))
    assert unknown(*inputs).shape[0] == 2
    inputs[position] = spoil(inputs[position])
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        unknown(*inputs)
    assert message in str(caught.value)


def test_many_threads_at_once(rng):
    cases = [operands(rng, kind, *WINDOWS["same"][:-1]) for kind in KINDS for _ in range(2)]
    kinds = [kind for kind in KINDS for _ in range(2)]
    expected = [KINDS[kind](*inputs).numpy() for kind, inputs in zip(kinds, cases, strict=True)]
    wrong = []

    def work(i):
        for _ in range(3):
            if not np.array_equal(KINDS[kinds[i]](*cases[i]).numpy(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_strategys_replicas_compute_on_their_own_devices(rng):
    strategy = tf.distribute.MirroredStrategy([f"{CARD}:0", f"{CARD}:1"])
    x, kernel, bias = operands(rng, "pointwise", *WINDOWS["plain"][:-1])
    true = oracle.convolve("pointwise", [x, kernel], bias).numpy()

    @tf.function
    def both():
        return strategy.run(lambda: bridge.pointwise_conv2d(x, kernel, bias))

    nodes = [
        node for node in both.get_concrete_function().graph.get_operations() if node.type == "FastsepconvPointwise"
    ]
    devices = [tf.DeviceSpec.from_string(node.device) for node in nodes]
    assert [(device.device_type, device.device_index) for device in devices] == [(CARD, 0), (CARD, 1)]
    for y in strategy.experimental_local_results(both()):
        assert_close("y", y.numpy(), true)


def test_a_saved_model_runs_on_the_card_too(rng, tmp_path, ran):
    inputs = operands(rng, "separable", *WINDOWS["plain"][:-1], dtype="float32")
    module = tf.Module()
    module.call = tf.function(KINDS["separable"], input_signature=[tf.TensorSpec(t.shape, t.dtype) for t in inputs])
    expected = module.call(*inputs).numpy()
    tf.saved_model.save(module, str(tmp_path))
    ran.clear()
    np.testing.assert_array_equal(tf.saved_model.load(str(tmp_path)).call(*inputs), expected)
    assert ran


def test_a_training_step_is_keras_own(ran):
    def network(separable, depthwise):
        return keras.Sequential([
            keras.Input((7, 6, 3)),
            separable(4, 3, padding="same", activation="relu", dtype="float64"),
            depthwise(3, strides=2, dtype="float64"),
            keras.layers.Flatten(dtype="float64"),
            keras.layers.Dense(2, activation="softmax", dtype="float64"),
        ])  # fmt: skip

    keras.utils.set_random_seed(2)
    ours = network(fastsepconv.FastSeparableConv2D, fastsepconv.FastDepthwiseConv2D)
    theirs = network(keras.layers.SeparableConv2D, keras.layers.DepthwiseConv2D)
    theirs.set_weights(ours.get_weights())
    images, labels = np.random.default_rng(0).random((4, 7, 6, 3)), np.array([0, 1, 1, 0])
    for model in (ours, theirs):
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        model.fit(images, labels, batch_size=2, epochs=2, shuffle=False, verbose=0)
    for weight, our, their in zip(ours.weights, ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-8, atol=1e-10, err_msg=weight.path)
    np.testing.assert_allclose(ours.predict(images, verbose=0), theirs.predict(images, verbose=0), rtol=1e-8)
    assert sum("d_kernel" in name for name in ran) >= 3 * 4  # kernels, each at four steps


NETWORKS = {
    "tutorial": lambda: xception(separable_layer=keras.layers.SeparableConv2D),
    "applications": lambda: keras.applications.Xception(weights=None, classes=7),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_whole_networks_predict_and_fit_on_a_card_only(name, ran):
    """On a card only: for the simulator this is too much, a network of few channels is in `check_tensorflow`."""
    keras.utils.set_random_seed(3)
    stock = NETWORKS[name]()
    ours = fastsepconv.convert(stock)
    numbers = np.random.default_rng(0)
    images, labels = numbers.random((4, *stock.input_shape[1:]), np.float32), np.array([0, 6, 3, 3])
    np.testing.assert_allclose(ours.predict(images, verbose=0), stock.predict(images, verbose=0), rtol=1e-3, atol=1e-5)
    losses = []
    for model in (ours, stock):
        model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
        losses.append(model.fit(images, labels, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert len(ran) >= 34 * (1 + 2 * 2), "of each layer: a prediction, and two steps forward and back"


def test_what_is_on_the_cpu_is_computed_there_or_copied_on_a_card_only(rng, backend, ran, monkeypatch):
    """On a card only: the exchanged devices lack the other one."""
    monkeypatch.undo()
    inputs = operands(rng, "separable", *WINDOWS["plain"][:-1])
    with tf.device("CPU:0"):
        y = bridge.separable_conv2d(*map(tf.identity, inputs))
    assert not on_card(y) and bool(ran) == (backend == "cuda")
    fastsepconv.set_backend("cpu")
    ran.clear()
    assert not on_card(bridge.separable_conv2d(*inputs)) and ran == []
