"""Kernels of frozen models: packed once, given back in the end; nothing but constants is kept."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv.bridge import tensorflow_freeze
from fastsepconv.layers import FastSeparableConv2D

from . import oracle
from .cases import add_node, operands
from .frozen import marks, small


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
