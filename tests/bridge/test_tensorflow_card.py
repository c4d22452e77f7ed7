"""TensorFlow's tensors on a card, without one: the ops' kernels for it, and who is given what.

`exchanged_devices` lets TensorFlow run those kernels on its CPU: in the simulator, and on a double of the driver.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

from fastsepconv import dispatch
from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.bridge import tensorflow_card
from fastsepconv.bridge.tensorflow_registration import FORWARD_DTYPES

from ..kernels.cuda.conftest import toolkit
from .cases import operands

__all__ = ["toolkit"]

ROOT = Path(__file__).parents[2]
SIZES = (2, 6, 7, 5), (3, 3), 1, 6
KERAS = "tests/kernels/cuda/simulated/check_tensorflow.py"


def run_exchanged(*arguments, least, **settings):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.bridge.exchanged_devices"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEPCONV_")}
    settings = kept | {"CUDA_VISIBLE_DEVICES": "-1"} | settings
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= least and "skipped" not in done.stdout, done.stdout


def test_in_the_simulator():
    chosen = "not on_a_card_only and not which_way"
    run_exchanged("tests/bridge/check_tensorflow_card.py", KERAS, "-k", chosen, least=200, NUMBA_ENABLE_CUDASIM="1")


def test_what_is_asked_of_the_driver(toolkit):
    run_exchanged("tests/bridge/check_tensorflow_waits.py", least=10)


@pytest.fixture
def beside_a_card(monkeypatch):
    """As if the ops' kernels for a card were registered, and there were one."""
    monkeypatch.setattr(tensorflow_card, "_serves", lambda: True)
    monkeypatch.setattr(dispatch, "_chosen", "auto")


def nodes_on(device: str | None, build=bridge.separable_conv2d) -> list[str]:
    """The devices of this package's nodes in a graph that is built under `tf.device(device)`."""
    with tf.Graph().as_default() as graph, tf.device(device):
        inputs = [tf.compat.v1.placeholder(tf.float32, tensor.shape) for tensor in operands(rng(), "separable", *SIZES)]
        y = build(*inputs)
        tf.gradients(y, inputs)
        return [node.device for node in graph.get_operations() if node.type.startswith("Fastsepconv")]


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("device", [None, "/device:GPU:0", "/job:worker/replica:0/task:1/device:GPU:3"])
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_a_graphs_nodes_are_where_tensorflow_puts_them(beside_a_card, monkeypatch, backend, device):
    monkeypatch.setattr(dispatch, "_chosen", backend)
    monkeypatch.setattr(dispatch, "kernels", lambda: bridge.cpu if backend == "auto" else None)
    assert nodes_on(device) == [device or ""] * 2, "forward and backward"


def test_a_graphs_nodes_are_on_the_cpu_where_its_backend_was_set(beside_a_card, monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", "cpu")
    assert nodes_on("/job:worker/device:GPU:0") == ["/job:worker/device:CPU:0"] * 2


def test_what_a_graph_has_on_the_cpu_is_copied_for_a_card(beside_a_card, monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", "cuda")
    monkeypatch.setattr(dispatch, "kernels", lambda: None)
    assert nodes_on("/device:CPU:0") == []


def test_eager_tensors_are_computed_where_they_are(beside_a_card, monkeypatch):
    x = tf.zeros((1, 2, 2, 3))
    seen = []

    def device(name):
        seen.append(name)
        return tensorflow_card._ANYWHERE

    monkeypatch.setattr(tensorflow_card.tf, "device", device)
    for backend in ("auto", "cuda", "cpu", "reference"):
        monkeypatch.setattr(dispatch, "_chosen", backend)
        tensorflow_card.placement(x)
    assert seen == [x.device, x.device, "/device:CPU:0", "/device:CPU:0"]
    assert not tensorflow_card.takes(x), "it is on the CPU"


def test_without_a_gpu_nothing_is_registered_and_everything_is_as_before():
    """On this machine: TensorFlow sees no GPU, or the CUDA kernels cannot run."""
    if tensorflow_card.obstacle() is None:
        pytest.skip("there is a GPU here")
    x = tf.zeros((1, 2, 2, 3))
    assert tensorflow_card._apis == [] and not tensorflow_card.takes(x)
    assert tensorflow_card.placement(x) is tensorflow_card._ANYWHERE
    registered = kernels.get_registered_kernels_for_op("FastsepconvSeparable").kernel
    assert [kernel.device_type for kernel in registered] == ["CPU"] * len(FORWARD_DTYPES), "one a dtype"
    assert "where they are" not in bridge.status()["reason"]
