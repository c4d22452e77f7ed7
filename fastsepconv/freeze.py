"""freeze: a Keras model as one TensorFlow graph of constants, for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from . import checks
from .copying import copy_model, layers_of
from .layers import FastDepthwiseConv2D, FastSeparableConv2D

FOLDED = (FastSeparableConv2D, FastDepthwiseConv2D, keras.layers.Conv2D)

Pair = tuple[keras.Layer, keras.layers.BatchNormalization]


def freeze(model: keras.Model) -> Callable[..., Any]:
    """The model for prediction, with its weights as they are now.

    Batch normalisation that follows a convolution becomes part of its weights, a ReLU before or behind one of this
    package's layers part of its kernel. So does, on the CPU in float32 and float64, what is added to the result of a
    layer that ends in a pointwise step, where image sizes are known; and this package's kernels compute 1x1
    convolutions. Each pointwise kernel is packed at the first run and kept: as much memory again as those kernels.
    TensorFlow folds what else it can. Later changes of the model do not show.

    Args:
        model: any built Functional or Sequential model, on Keras with TensorFlow. It is left as it is.

    Returns:
        A function of the model's inputs, tensors or arrays of any batch size, each an argument, in the order of
        `model.inputs`. What it returns is that of `model(inputs, training=False)`, but for rounding. Gradients do
        not pass it: those of a tape are None.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: the model has not been built, or cannot be copied.
        RuntimeError: Keras does not run on TensorFlow.

    Source: TensorFlow's frozen graphs (tensorflow/python/framework/convert_to_constants.py); Jacob et al.,
        Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (2018), section
        3.2, for the folding.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(f"freeze needs Keras on TensorFlow. It runs on {keras.backend.backend()}.")
    if not isinstance(model, keras.Model):
        raise checks.invalid("model", "a Keras model", type(model).__name__, kind=TypeError)
    if not getattr(model, "inputs", None):
        raise checks.invalid("model", "a model that knows its inputs", f"{model.name}, which has not been built")
    from .bridge import tensorflow_freeze

    copy = copy_model(model)
    for convolution, norm in list(_foldable(copy)):
        _fold(convolution, norm)
    if tensorflow_freeze.for_cpu_kernels():
        for layer in filter(_is_pointwise, layers_of(copy)):
            object.__setattr__(layer, "__class__", _Pointwise)
    return tensorflow_freeze.as_constants(copy)


class _Folded(keras.layers.BatchNormalization):
    """What is left of a batch normalisation that has become part of the layer before it."""

    def call(self, inputs: Any, *arguments: Any, **named: Any) -> Any:
        return inputs


class _Pointwise(keras.layers.Conv2D):
    """A 1x1 convolution, strided or not, by this package's kernels."""

    def call(self, inputs: Any) -> Any:
        from .bridge import tensorflow as bridge

        bias = self.bias if self.use_bias else None
        if self.strides == (1, 1):
            return self.activation(bridge.pointwise_conv2d(inputs, self.kernel, bias))
        pixels = keras.ops.ones((1, 1, self.kernel.shape[2], 1), self.compute_dtype)
        return self.activation(bridge.separable_conv2d(inputs, pixels, self.kernel, bias, strides=self.strides))


def _is_pointwise(layer: keras.Layer) -> bool:
    """Whether `_Pointwise` computes what the layer does, and as fast: halves may have instructions of their own."""
    return (
        type(layer) is keras.layers.Conv2D
        and (layer.kernel_size, layer.groups, layer.data_format) == ((1, 1), 1, "channels_last")
        and layer.compute_dtype in ("float32", "float64")
    )


def _foldable(model: keras.Model) -> Iterator[Pair]:
    """Each linear convolution that nothing reads but one batch normalisation over its channels, and that one."""
    parts = layers_of(model)
    # What a layer holds, as a wrapper does, it may call in ways that no graph of layers shows.
    held = {
        id(part) for each in parts if not isinstance(each, keras.Sequential | keras.Function) for part in each._layers
    }
    outputs = {id(tensor) for part in parts for tensor in getattr(part, "outputs", None) or ()}
    for norm in parts:
        if type(norm) is not keras.layers.BatchNormalization or len(norm._inbound_nodes) != 1:
            continue
        tensor, *_ = norm._inbound_nodes[0].input_tensors  # a mask counts in training alone
        layer = tensor._keras_history.operation
        if type(layer) not in FOLDED or id(tensor) in outputs or {id(layer), id(norm)} & held:
            continue
        read_once = len(layer._inbound_nodes) == 1 and len(layer._outbound_nodes) == 1
        axis = norm.axis % len(tensor.shape)
        channels = len(tensor.shape) - 1 if layer.data_format == "channels_last" else 1
        plain = layer.activation is keras.activations.linear and not getattr(layer, "lora_enabled", False)
        if read_once and axis == channels and plain:
            yield layer, norm


def _fold(layer: keras.Layer, norm: keras.layers.BatchNormalization) -> None:
    """Makes `layer` compute gamma * (y - mean) / sqrt(variance + epsilon) + beta for its former result y."""
    mean, variance = (np.float64(each) for each in (norm.moving_mean, norm.moving_variance))
    scale = (np.float64(norm.gamma) if norm.scale else 1.0) / np.sqrt(variance + norm.epsilon)
    bias = np.float64(layer.bias) if layer.use_bias else 0.0
    bias = (bias - mean) * scale + (np.float64(norm.beta) if norm.center else 0.0)
    if getattr(layer, "order", "") == "depthwise_pointwise":
        kernel, factors = layer.pointwise_kernel, scale
    elif isinstance(layer, keras.layers.Conv2D):
        kernel, factors = layer.kernel, scale
    else:
        kernel = layer.depthwise_kernel if isinstance(layer, FastSeparableConv2D) else layer.kernel
        factors = scale.reshape(kernel.shape[-2:])
    kernel.assign(np.float64(kernel) * factors)
    if not layer.use_bias:
        layer._tracker.unlock()
        layer.bias = layer.add_weight(name="bias", shape=bias.shape)
        layer._tracker.lock()
        layer.use_bias = True
    layer.bias.assign(bias)
    object.__setattr__(norm, "__class__", _Folded)
