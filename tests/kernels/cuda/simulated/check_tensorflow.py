"""Keras on TensorFlow with backend="cuda", in the simulator: layers, gradients of gradients, and a training step.

TensorFlow sees no GPU, so that arrays are copied. No kernel of the CPU may run: each of its functions is made to fail.
"""

from __future__ import annotations

import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.kernels import cpu
from fastsepconv.kernels.cuda import launch
from tests.bridge import oracle
from tests.bridge.cases import KINDS, WINDOWS, assert_second_order, gradients, operands, window_of
from tests.kernels.cuda.simulated.training_step import assert_a_training_step_is_keras
from tests.tolerances import assert_close

tf.config.set_visible_devices([], "GPU")


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


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
def test_a_training_step_of_xception_leaves_every_weight_as_keras_does(order, monkeypatch, ran):
    assert_a_training_step_is_keras(order, monkeypatch, ran)
