"""TensorFlow's own operations, and ours in their place: each in a tf.function, with Variables for weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tensorflow as tf

from .. import data, networks
from ..problems import FORWARD, PREDICT, Layer, Problem
from . import Unsupported


class Provider:
    def __init__(self, threads: int, ours: bool, dtype: str | None = None):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        self.ours, self.dtype = ours, dtype  # None for the problem's own
        self.ops = _our_ops() if ours else _stock_ops()
        self.versions = {"tensorflow": tf.__version__}
        if ours:
            import numba

            import fastsepconv

            self.versions |= {"fastsepconv": fastsepconv.__version__, "numba": numba.__version__}

    def prepare(self, problem: Problem, folder: Path):
        if isinstance(problem, Layer):
            return self._layer(problem, folder)
        model = networks.build(problem.suite, ours=self.ours)
        networks.restore(model, folder)
        step = networks.predict_step if problem.mode == PREDICT else networks.train_step
        return step(model, folder)

    def _layer(self, layer: Layer, folder: Path):
        if layer.op not in self.ops:
            raise Unsupported(f"no {layer.op} operation")
        dtype = self.dtype or layer.dtype
        arrays = {name: tf.cast(array, dtype) for name, array in data.load_input(folder).items()}
        build = _forward_step if layer.mode == FORWARD else _backward_step
        op = partial(self.ops[layer.op], layer)
        sets = [
            {name: tf.Variable(tf.cast(array, dtype)) for name, array in weights.items()}
            for weights in data.load_weights(layer, folder)
        ]
        steps = [build(op, weights, arrays) for weights in sets]
        return steps, lambda outputs: {name: value.numpy() for name, value in zip(layer.outputs, outputs, strict=True)}


def _forward_step(op, weights, arrays):
    @tf.function(autograph=False)
    def forward(x):
        return (op(x, **weights),)

    return lambda: forward(arrays["x"])


def _backward_step(op, weights, arrays):
    """Forward and backward; returning y and every gradient keeps the graph from pruning any of them."""

    @tf.function(autograph=False)
    def backward(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = op(x, **weights)
        return y, *tape.gradient(y, [x, *weights.values()], output_gradients=dy)

    return lambda: backward(arrays["x"], arrays["dy"])


def _stock_ops() -> dict:
    """By name, as functions of a layer, x and weights."""

    def window(layer):
        return {
            "strides": [1, layer.strides, layer.strides, 1],
            "padding": "SAME",
            "dilations": [layer.dilation, layer.dilation],
        }

    def biased(y, bias):
        return y if bias is None else tf.nn.bias_add(y, bias)

    def separable(layer, x, depthwise, pointwise, bias=None):
        return biased(tf.nn.separable_conv2d(x, depthwise, pointwise, **window(layer)), bias)

    def depthwise(layer, x, depthwise, bias=None):
        return biased(tf.nn.depthwise_conv2d(x, depthwise, **window(layer)), bias)

    def pointwise(layer, x, pointwise, bias=None):
        return biased(tf.nn.conv2d(x, pointwise, 1, "SAME"), bias)

    return {"separable": separable, "depthwise": depthwise, "pointwise": pointwise}


def _our_ops() -> dict:
    """Likewise."""
    from fastsepconv.bridge import tensorflow as bridge

    def window(layer):
        return {"strides": layer.strides, "padding": "same", "dilation_rate": layer.dilation}

    def separable(layer, x, depthwise, pointwise, bias=None):
        return bridge.separable_conv2d(x, depthwise, pointwise, bias, **window(layer))

    def depthwise(layer, x, depthwise, bias=None):
        return bridge.depthwise_conv2d(x, depthwise, bias, **window(layer))

    def pointwise(layer, x, pointwise, bias=None):
        return bridge.pointwise_conv2d(x, pointwise, bias)

    return {"separable": separable, "depthwise": depthwise, "pointwise": pointwise}
