"""Keras on TensorFlow with backend="cuda", in the simulator: layers, gradients of gradients, and a training step.

TensorFlow sees no GPU, so that arrays are copied. No kernel of the CPU may run: each of its functions is made to fail.
"""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.kernels import cpu
from fastsepconv.kernels.cuda import launch
from fastsepconv.models import pointwise_then_depthwise, xception
from tests.bridge import oracle
from tests.bridge.cases import KINDS, WINDOWS, assert_second_order, gradients, operands, window_of
from tests.tolerances import assert_close

tf.config.set_visible_devices([], "GPU")
FILTERS = {"ENTRY_FILTERS": (2, 4, 6), "MIDDLE_FILTERS": 6, "EXIT_FILTERS": (6, 8)}


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """The names of the CUDA kernels that ran; one of the CPU's ends the test."""

    def refuse(*arguments):
        raise AssertionError("a kernel of the CPU ran")

    for module in (cpu, cpu.depthwise, cpu.pointwise, cpu.separable):
        for name in dir(module):
            if name.endswith(("forward", "backward")):
                monkeypatch.setattr(module, name, refuse)
    fastsepconv.set_backend("cuda")
    names: list[str] = []
    launch.listeners.append(names.append)
    yield names
    launch.listeners.remove(names.append)
    fastsepconv.set_backend("auto")


def test_the_bridge_says_which_way_it_takes():
    status = bridge.status()
    assert (status["path"], status["backend"]) == ("numpy_function", "cuda")
    assert "cuda backend" in status["reason"]


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_results_and_gradients_are_tensorflows(window, kind, in_graph, rng, ran):
    *sizes, options = window
    inputs = operands(rng, kind, *sizes)
    options = window_of(kind, options)

    def ours(*inputs):
        return gradients(lambda *inputs: KINDS[kind](*inputs, **options), inputs)

    y, found = (tf.function(ours) if in_graph else ours)(*inputs)
    true, expected = gradients(lambda *inputs: oracle.convolve(kind, inputs[:-1], inputs[-1], **options), inputs)
    for name, our, their in zip(("y", "dx", "1", "2", "3"), (y, *found), (true, *expected), strict=False):
        assert_close(f"{kind} {name}", our.numpy(), their.numpy())
    steps = {"depthwise", "pointwise"} if kind == "separable" else {kind}
    assert {name.partition("_")[0] for name in ran} == {"row", "part", *steps}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_are_tensorflows(kind, rng):
    assert_second_order(kind, rng)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype, rng):
    inputs = [tf.cast(tensor, dtype) for tensor in operands(rng, "separable", *WINDOWS["same"][:-1])]
    y, found = gradients(lambda *inputs: bridge.separable_conv2d(*inputs, padding="same"), inputs)
    doubles = [tf.cast(tensor, tf.float64) for tensor in inputs]
    true, expected = gradients(lambda *ds: oracle.convolve("separable", ds[:-1], ds[-1], padding="same"), doubles)
    for our, their in zip((y, *found), (true, *expected), strict=True):
        assert our.dtype == dtype
        assert_close("half", our.numpy(), their.numpy())


def narrow_xception(monkeypatch, *arguments, **options) -> keras.Model:
    """The tutorial's Xception, its whole topology with few channels."""
    module = sys.modules[xception.__module__]
    for name, filters in FILTERS.items():
        monkeypatch.setattr(module, name, filters)
    return xception((32, 32, 1), 3, *arguments, dtype="float64", **options)


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
def test_a_training_step_of_xception_leaves_every_weight_as_keras_does(order, monkeypatch, ran):
    """In float64, where rounding cannot hide a difference that 34 layers and 40 normalisations would blow up."""
    stock = keras.layers.SeparableConv2D if order == "depthwise_pointwise" else pointwise_then_depthwise
    keras.utils.set_random_seed(1)
    ours = narrow_xception(monkeypatch, order=order)
    theirs = narrow_xception(monkeypatch, stock)
    assert sum(isinstance(layer, fastsepconv.FastSeparableConv2D) for layer in ours.layers) == 34
    theirs.set_weights(ours.get_weights())
    before = ours.get_weights()
    rng = np.random.default_rng(0)
    images, labels = rng.random((2, 32, 32, 1)), np.array([0, 2])
    losses = []
    for model in (ours, theirs):
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        losses.append(model.train_on_batch(images, labels))
    np.testing.assert_allclose(*losses, rtol=1e-9)
    moved = 0
    for weight, our, their, old in zip(ours.weights, ours.get_weights(), theirs.get_weights(), before, strict=True):
        scale = max(1e-3, np.abs(their).max())  # a bias before a normalisation has a gradient of nothing but rounding
        assert np.abs(our - their).max() <= 1e-8 * scale, weight.path
        moved += not np.array_equal(our, old)
    assert moved > len(before) / 2
    steps = {"depthwise_forward": 34, "pointwise_forward": 34, "depthwise_d_x": 34, "pointwise_d_x": 34,
             "depthwise_d_kernel": 34, "pointwise_d_kernel": 34}  # fmt: skip
    for kernel, least in steps.items():
        assert ran.count(f"{kernel}[{','.join(['float64'] * (2 if 'd_kernel' in kernel else 3))}]") >= least, kernel
