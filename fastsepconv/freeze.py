"""freeze: a Keras model as one TensorFlow graph of constants, for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from . import checks
from .copying import copy_model, layers_of
from .layers import FastDepthwiseConv2D, FastSeparableConv2D

Pair = tuple[keras.Layer, keras.layers.BatchNormalization]


def freeze(model: keras.Model) -> Callable[..., Any]:
    """The model for prediction, with its weights as they are now.

    Batch normalisation that follows one of this package's layers becomes part of its weights, and a ReLU part of its
    kernel. Each pointwise kernel is packed at the first run and kept: as much memory again as those kernels. TensorFlow
    folds what else it can. Later changes of the model do not show.

    Args:
        model: any built Functional or Sequential model, on Keras with TensorFlow. It is left as it is.

    Returns:
        A function of the model's inputs, tensors or arrays of any batch size, each an argument, in the order of
        `model.inputs`. What it returns is that of `model(inputs, training=False)`, but for rounding. There are no
        gradients.

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
    return tensorflow_freeze.as_constants(copy)


class _Folded(keras.layers.BatchNormalization):
    """What is left of a batch normalisation that has become part of the layer before it."""

    def call(self, inputs: Any, *arguments: Any, **named: Any) -> Any:
        return inputs


def _foldable(model: keras.Model) -> Iterator[Pair]:
    """Each linear layer of ours that nothing reads but one batch normalisation over its channels, and that one."""
    outputs = {id(tensor) for part in layers_of(model) for tensor in getattr(part, "outputs", None) or ()}
    for norm in layers_of(model):
        if type(norm) is not keras.layers.BatchNormalization or len(norm._inbound_nodes) != 1:
            continue
        tensor, *_ = norm._inbound_nodes[0].input_tensors  # a mask counts in training alone
        layer = tensor._keras_history.operation
        if type(layer) not in (FastSeparableConv2D, FastDepthwiseConv2D) or id(tensor) in outputs:
            continue
        read_once = len(layer._inbound_nodes) == 1 and len(layer._outbound_nodes) == 1
        axis = norm.axis % len(tensor.shape)
        channels = len(tensor.shape) - 1 if layer.data_format == "channels_last" else 1
        if read_once and axis == channels and layer.activation is keras.activations.linear:
            yield layer, norm


def _fold(layer: keras.Layer, norm: keras.layers.BatchNormalization) -> None:
    """Makes `layer` compute gamma * (y - mean) / sqrt(variance + epsilon) + beta for its former result y."""
    mean, variance = (np.float64(each) for each in (norm.moving_mean, norm.moving_variance))
    scale = (np.float64(norm.gamma) if norm.scale else 1.0) / np.sqrt(variance + norm.epsilon)
    bias = np.float64(layer.bias) if layer.use_bias else 0.0
    bias = (bias - mean) * scale + (np.float64(norm.beta) if norm.center else 0.0)
    if getattr(layer, "order", "") == "depthwise_pointwise":
        kernel, factors = layer.pointwise_kernel, scale
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
