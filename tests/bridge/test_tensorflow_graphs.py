"""The ops inside what TensorFlow builds: graphs with unknown sizes, data pipelines, threads, replicas, SavedModels."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.bridge import tensorflow_kernels, tensorflow_state
from fastsepconv.bridge.static_shapes import by_name
from fastsepconv.kernels.geometry import resolve

from .cases import KINDS, WINDOWS, add_node, gradients, operands, window_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "signature", [None, (None, None, None, 5), (None, None, None, None), (2, 6, None, 5)], ids=str
)  # fmt: skip
def test_unknown_sizes(rng, kind, signature):
    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 2), 2, 4)
    window = window_of(kind, {"padding": "same", "strides": 2})
    expected, expected_gradients = gradients(lambda *t: KINDS[kind](*t, **window), inputs)
    specs = [tf.TensorSpec(signature, tf.float64)]
    specs += [tf.TensorSpec(None if signature is None else tensor.shape, tf.float64) for tensor in inputs[1:]]
    traced = tf.function(
        lambda *t: gradients(lambda *t: KINDS[kind](*t, **window), list(t)), input_signature=specs
    ).get_concrete_function()
    y, ours = traced(*inputs)
    np.testing.assert_array_equal(y, expected)
    for gradient, expected_gradient in zip(ours, expected_gradients, strict=True):
        np.testing.assert_array_equal(gradient, expected_gradient)
    static_y, static_gradients = traced.structured_outputs
    if signature is not None:
        channels = expected.shape[-1] if signature[-1] or kind != "depthwise" else 10
        height = None if signature[1] is None else expected.shape[1]
        assert static_y.shape.as_list() == [signature[0], height, None, channels]
        assert [gradient.shape for gradient in static_gradients] == [spec.shape for spec in specs]


def test_static_shapes_are_those_that_come_out(rng):
    for case in WINDOWS.values():
        *sizes, window = case
        inputs = operands(rng, "separable", *sizes)
        traced = tf.function(lambda *t, window=window: bridge.separable_conv2d(*t, **window)).get_concrete_function(
            *inputs
        )
        assert traced.structured_outputs.shape == bridge.separable_conv2d(*inputs, **window).shape


@pytest.mark.parametrize(
    ("kind", "kernels", "expected"),
    [
        ("Separable", [(3, 3, 5, 2), (1, 1, 10, 4)], [2, None, None, 4]),
        ("Depthwise", [(3, 3, 5, 2)], [2, None, None, 10]),
        ("Depthwise", [(3, 3, 5, None)], [2, None, None, None]),
        ("Pointwise", [(1, 1, 5, 4)], [2, 6, 7, 4]),
        ("Pointwise", [None], [2, 6, 7, None]),
    ],
)
def test_shape_function_of_the_op_alone(kind, kernels, expected):
    """What TensorFlow works out by itself where a graph is imported."""
    window = {} if kind == "Pointwise" else by_name(bridge._window(1, "valid", 1))
    with tf.Graph().as_default():
        inputs = [tf.compat.v1.placeholder(tf.float32, shape) for shape in [(2, 6, 7, 5), *kernels]]
        y = add_node(kind, *inputs, **window)
        assert y.shape.as_list() == expected
        y = add_node(kind, tf.compat.v1.placeholder(tf.float32), *inputs[1:], **window)
        assert y.shape.rank == 4
        with pytest.raises(ValueError, match="rank 4"):
            add_node(kind, tf.compat.v1.placeholder(tf.float32, (2, 6, 5)), *inputs[1:], **window)


def test_sizes_at_run_time_are_those_of_geometry():
    """The compiled arithmetic beside `kernels.geometry`, over a grid."""
    pads = ["valid", "same", (0, 0), (1, 0), (2, 3)]
    checked = 0
    for size, taps, stride, dilation, pad in itertools.product(range(8), (1, 2, 3, 5), (1, 2, 3), (1, 2, 4), pads):
        padding = pad if isinstance(pad, str) else (pad, pad)
        g = resolve((1, size, size, 1), (taps, taps, 1, 1), (stride, stride), padding, (dilation, dilation))
        state = np.zeros(tensorflow_state.WORDS, np.int64)
        attributes = bridge._window(stride, padding, dilation)
        for word, value in zip((1, 3, 5, 6), attributes[1::2], strict=True):
            state[word : word + np.size(value)] = value
        for axis, expected in enumerate([(g.out_height, g.pad_top), (g.out_width, g.pad_left)]):
            length, before = tensorflow_kernels._axis(state, axis, size, taps)
            assert (max(0, length), before) == expected
            checked += 1
    assert checked == 2 * 8 * 4 * 3 * 3 * 5


def test_data_pipeline(rng):
    _, depthwise, pointwise, bias = operands(rng, "separable", (1, 9, 9, 3), (3, 3), 1, 4, "float32")
    images = tf.constant(rng.standard_normal((32, 1, 9, 9, 3)), tf.float32)
    mapped = tf.data.Dataset.from_tensor_slices(images).map(
        lambda image: bridge.separable_conv2d(image, depthwise, pointwise, bias), num_parallel_calls=4
    )
    for image, y in zip(images, mapped, strict=True):
        np.testing.assert_array_equal(y, bridge.separable_conv2d(image, depthwise, pointwise, bias))


def test_many_threads_at_once(rng):
    inputs = operands(rng, "separable", (2, 15, 16, 24), (3, 3), 1, 40, "float32")
    window = {"padding": "same"}
    traced = tf.function(lambda *t: gradients(lambda *t: bridge.separable_conv2d(*t, **window), list(t)))
    expected = [tensor.numpy() for tensor in tf.nest.flatten(traced(*inputs))]
    failures = []

    def work(function):
        for _ in range(20):
            for tensor, right in zip(tf.nest.flatten(function(*inputs)), expected, strict=True):
                if not np.array_equal(tensor, right):
                    failures.append(tensor)

    def eager(*t):
        return gradients(lambda *t: bridge.separable_conv2d(*t, **window), list(t))

    workers = [threading.Thread(target=work, args=(function,)) for function in (eager, traced) * 3]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_xla_says_that_it_cannot():
    compiled = tf.function(bridge.depthwise_conv2d, jit_compile=True)
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.UnimplementedError), match="FastsepconvDepthwise"):
        compiled(tf.ones((1, 4, 4, 1)), tf.ones((2, 2, 1, 1)))


def test_while_loop_and_cond(rng):
    x, kernel = operands(rng, "depthwise", (1, 5, 5, 2), (3, 3), 1, 0)[:2]

    @tf.function
    def repeated(x, times):
        for _ in tf.range(times):
            x = bridge.depthwise_conv2d(x, kernel, padding="same") if tf.reduce_sum(x) < 1e9 else x
        return x

    y, (dx,) = gradients(lambda x: repeated(x, tf.constant(3)), [x])
    expected, (expected_dx,) = gradients(
        lambda x: bridge.depthwise_conv2d(
            bridge.depthwise_conv2d(bridge.depthwise_conv2d(x, kernel, padding="same"), kernel, padding="same"),
            kernel,
            padding="same",
        ),
        [x],
    )
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, expected_dx)


def test_recompute_grad_and_custom_gradient(rng):
    inputs = operands(rng, "separable", (1, 5, 5, 2), (3, 3), 1, 3)
    y, expected = gradients(bridge.separable_conv2d, inputs)
    recomputed_y, recomputed = gradients(tf.recompute_grad(bridge.separable_conv2d), inputs)
    np.testing.assert_array_equal(recomputed_y, y)
    for ours, right in zip(recomputed, expected, strict=True):
        np.testing.assert_array_equal(ours, right)


def test_legacy_session(rng):
    x, kernel = (tensor.numpy() for tensor in operands(rng, "depthwise", (1, 5, 5, 2), (3, 3), 1, 0)[:2])
    expected = bridge.depthwise_conv2d(x, kernel)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        placeholder = tf.compat.v1.placeholder(tf.float64, [None, None, None, 2])
        y = bridge.depthwise_conv2d(placeholder, kernel)
        np.testing.assert_array_equal(session.run(y, {placeholder: x}), expected)


RELOAD = """
import sys, numpy as np, tensorflow as tf
import fastsepconv.bridge.tensorflow
saved = tf.saved_model.load(sys.argv[1])
data = np.load(sys.argv[2])
np.testing.assert_array_equal(saved.predict(tf.constant(data["x"])), data["y"])
np.testing.assert_array_equal(saved.gradient(tf.constant(data["x"])), data["dx"])
print("the same")
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saved_model_in_another_process(rng, tmp_path, dtype):
    x, *kernels = operands(rng, "separable", (2, 6, 7, 3), (3, 3), 2, 4, dtype)
    module = tf.Module()
    module.kernels = [tf.Variable(kernel) for kernel in kernels]
    spec = tf.TensorSpec([None, None, None, 3], dtype)

    def predict(x):
        return bridge.separable_conv2d(x, *module.kernels, strides=(2, 1), padding=((1, 0), (0, 2)))

    module.predict = tf.function(predict, input_signature=[spec])
    module.gradient = tf.function(lambda x: gradients(predict, [x])[1][0], input_signature=[spec])
    tf.saved_model.save(module, str(tmp_path / "model"))
    np.savez(tmp_path / "data.npz", x=x, y=module.predict(x), dx=module.gradient(x))
    paths = str(tmp_path / "model"), str(tmp_path / "data.npz")
    done = subprocess.run([sys.executable, "-c", RELOAD, *paths], capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr


REPLICAS = """
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
from fastsepconv.bridge import tensorflow as bridge
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
rng = np.random.default_rng(0)
x, depthwise, pointwise = (rng.standard_normal(s).astype("float32") for s in ((8, 6, 6, 3), (3, 3, 3, 1), (1, 1, 3, 4)))
with strategy.scope():
    variables = tf.Variable(depthwise), tf.Variable(pointwise)

@tf.function
def step(x):
    with tf.GradientTape() as tape:
        y = bridge.separable_conv2d(x, *variables)
        loss = tf.reduce_sum(y ** 2)
    parts = tape.gradient(loss, variables)
    return y, [tf.distribute.get_replica_context().all_reduce("sum", part) for part in parts]

inputs = strategy.experimental_distribute_values_from_function(
    lambda context: tf.constant(np.split(x, 2)[context.replica_id_in_sync_group]))
for _ in range(5):
    y, split = strategy.run(step, (inputs,))
y = strategy.experimental_local_results(y)
constants = [tf.constant(depthwise), tf.constant(pointwise)]
with tf.GradientTape() as tape:
    tape.watch(constants)
    whole = bridge.separable_conv2d(x, *constants)
    loss = tf.reduce_sum(whole ** 2)
np.testing.assert_allclose(np.concatenate(y), whole, rtol=1e-5, atol=1e-5)
for part, expected in zip(split, tape.gradient(loss, constants)):
    for value in strategy.experimental_local_results(part):
        np.testing.assert_allclose(value, expected, rtol=1e-4)
print(len({part.backing_device for part in y}), "devices agree")
"""


def test_two_replicas():
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("2 devices agree\n"), done.stderr


def test_trains_in_a_keras_model(rng):
    x = keras.Input((8, 8, 3))
    layer = keras.layers.Lambda(
        lambda x: bridge.depthwise_conv2d(x, tf.ones((3, 3, 3, 1)), padding="same"), output_shape=(8, 8, 3)
    )
    model = keras.Sequential([x, layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    images = rng.standard_normal((16, 8, 8, 3)).astype("float32")
    history = model.fit(images, images.mean((1, 2, 3)), epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
