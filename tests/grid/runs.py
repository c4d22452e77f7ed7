"""One case by our layer, or by the stock layer: {"y": output, "x": its gradient, ...}, channels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from fastsepconv import FastDepthwiseConv2D, FastSeparableConv2D
from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.kernels.cpu import threads
from fastsepconv.layout import channels_last, from_channels_last
from fastsepconv.models import pointwise_then_depthwise
from tests.grid.arrays import by_arrays
from tests.grid.cases import Case


def ours(case: Case, arrays: dict, dy: np.ndarray, d_before: np.ndarray) -> dict[str, np.ndarray]:
    """By the way that the case names, on as many threads as it names."""
    usual = threads.get_num_threads()
    threads.set_num_threads(min(case.threads, usual))
    try:
        if case.by_arrays:
            return by_arrays(case, arrays, d_before)
        return _differentiated(case, arrays, dy, _our_layer(case) if case.layer_can else _function(case))
    finally:
        threads.set_num_threads(usual)


def stock(case: Case, arrays: dict, dy: np.ndarray) -> dict[str, np.ndarray]:
    """By Keras's own layer, or two of them, channels last, as TensorFlow wants it. Assumes: case.stock_can."""
    case = dataclasses.replace(case, data_format="channels_last")
    if case.operation == "pointwise_depthwise":
        layer = pointwise_then_depthwise(case.filters, **_arguments(case))
    elif case.operation == "pointwise":
        layer = keras.layers.Conv2D(case.filters, kernel_size=1, **_arguments(case))
    elif case.operation == "depthwise":
        layer = keras.layers.DepthwiseConv2D(**_arguments(case))
    else:
        layer = keras.layers.SeparableConv2D(case.filters, **_arguments(case))
    return _differentiated(case, arrays, dy, layer)


def _our_layer(case: Case) -> keras.Layer:
    if case.operation == "depthwise":
        return FastDepthwiseConv2D(**_arguments(case))
    return FastSeparableConv2D(case.filters, **_arguments(case), order=case.operation)


def _arguments(case: Case) -> dict:
    names = ("kernel_size", "depth_multiplier", "activation", "use_bias", "dtype")
    return case.window | {name: getattr(case, name) for name in names if getattr(case, name) is not None}


def _function(case: Case) -> Callable[..., tf.Tensor]:
    """What a layer would compute, had Keras the arguments."""
    convolve, activation = getattr(bridge, case.function), keras.activations.get(case.activation)
    return lambda **tensors: activation(convolve(**tensors, **case.options))


def _differentiated(case: Case, arrays: dict, dy: np.ndarray, convolve: Callable) -> dict[str, np.ndarray]:
    """Output and gradients, eagerly or in a graph that knows no batch size. `convolve` is a layer or a function."""
    x = from_channels_last(arrays["x"], case.data_format)
    weights = {name: values for name, values in arrays.items() if name != "x"}
    if isinstance(convolve, keras.Layer):
        convolve.build(x.shape)
        convolve.set_weights(list(weights.values()))
        sources = [variable.value for variable in convolve.trainable_variables]
        call = convolve
    else:
        sources = [tf.Variable(values) for values in weights.values()]
        call = lambda x: convolve(x=x, **dict(zip(weights, sources, strict=True)))  # noqa: E731

    def compute(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        return y, *tape.gradient(y, [x, *sources], output_gradients=dy)

    images = [tf.constant(x), tf.constant(from_channels_last(dy, case.data_format))]
    if case.run == "graph":
        signature = [tf.TensorSpec((None, *image.shape[1:]), image.dtype) for image in images]
        compute = tf.function(compute, input_signature=signature, autograph=False)
    results = dict(zip(["y", "x", *weights], (tensor.numpy() for tensor in compute(*images)), strict=True))
    return results | {name: channels_last(results[name], case.data_format) for name in ("y", "x")}
