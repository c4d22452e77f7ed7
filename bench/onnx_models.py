"""ONNX models of the problems: one convolution, or a Keras network of the layers that an Xception has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .problems import Layer

OPSET, IR_VERSION = 17, 8


class _Graph:
    """Nodes and constants as they are added; every tensor is `[N,C,H,W]`."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def add(self, op: str, inputs: list[str], **attributes) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def model(self, input_shape, output: str) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "fastsepconv", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def convolution(self, x: str, kernel, bias=None, strides=(1, 1), padding="same") -> str:
        """`kernel` `[R,S,C,F]`, as Keras keeps it."""
        return self._convolution(x, np.transpose(kernel, (3, 2, 0, 1)), bias, 1, strides, padding)

    def depthwise(self, x: str, kernel, bias=None, strides=(1, 1), padding="same", dilations=(1, 1)) -> str:
        """`kernel` `[R,S,C,M]` -> ONNX's `[C*M,1,R,S]` in C groups."""
        taps_h, taps_w, channels, multiplier = kernel.shape
        grouped = np.transpose(kernel, (2, 3, 0, 1)).reshape(channels * multiplier, 1, taps_h, taps_w)
        return self._convolution(x, grouped, bias, channels, strides, padding, dilations)

    def _convolution(self, x, kernel, bias, groups, strides, padding, dilations=(1, 1)) -> str:
        inputs = [x, self.constant(kernel)] + ([] if bias is None else [self.constant(bias)])
        window = {"strides": list(strides), "dilations": list(dilations)} | _padding(padding)
        return self.add("Conv", inputs, group=groups, **window)


def save(model: onnx.ModelProto, folder: Path, index: int) -> None:
    """Where `providers.onnx_files` looks for it."""
    (folder / "onnx").mkdir(exist_ok=True)
    onnx.save(model, str(folder / "onnx" / f"{index}.onnx"))


def layer_model(layer: Layer, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """x `[N,C,H,W]` -> y `[N,F,H,W]`."""
    graph, y, bias = _Graph(), "x", weights.get("bias")
    if "depthwise" in weights:
        # ONNX Runtime has no automatic padding of dilated kernels.
        padding = "same" if layer.dilation == 1 else layer.padding
        window = (layer.strides,) * 2, padding, (layer.dilation,) * 2
        y = graph.depthwise(y, weights["depthwise"], bias if layer.op == "depthwise" else None, *window)
    if "pointwise" in weights:
        y = graph.convolution(y, weights["pointwise"], bias)
    return graph.model((layer.batch, layer.channels, layer.size, layer.size), y)


def network_model(model) -> onnx.ModelProto:
    """A Functional Keras model, x `[N,C,H,W]` -> y `[N,classes]`, in inference mode."""
    graph, names = _Graph(), {}
    for layer in model.layers:
        kind = type(layer).__name__
        if kind == "InputLayer":
            names[id(layer.output)] = "x"
        elif kind in _WRITERS:
            node = layer._inbound_nodes[0]
            names[id(layer.output)] = _WRITERS[kind](graph, layer, *(names[id(x)] for x in node.input_tensors))
        else:
            raise ValueError(f"Invalid value for argument `model`. Expected an Xception's layers. Received: {kind}")
    _, height, width, channels = model.input_shape
    return graph.model(("N", channels, height, width), names[id(model.output)])


def _padding(padding: str | tuple[int, int]) -> dict:
    """The attribute for padding in words, or for the zeros before and behind the image along each axis."""
    if isinstance(padding, str):
        return {"auto_pad": {"same": "SAME_UPPER", "valid": "VALID"}[padding]}
    before, after = padding
    return {"pads": [before, before, after, after]}


def _activated(graph: _Graph, layer, x: str) -> str:
    op = {"linear": None, "relu": "Relu", "softmax": "Softmax"}[layer.activation.__name__]
    return x if op is None else graph.add(op, [x])


def _arrays(*weights):
    return [None if weight is None else weight.numpy() for weight in weights]


def _conv2d(graph, layer, x):
    kernel, bias = _arrays(layer.kernel, layer.bias)
    return _activated(graph, layer, graph.convolution(x, kernel, bias, layer.strides, layer.padding))


def _separable_conv2d(graph, layer, x):
    depthwise, pointwise, bias = _arrays(layer.depthwise_kernel, layer.pointwise_kernel, layer.bias)
    middle = graph.depthwise(x, depthwise, None, layer.strides, layer.padding)
    return _activated(graph, layer, graph.convolution(middle, pointwise, bias))


def _batch_normalization(graph, layer, x):
    arrays = _arrays(layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    return graph.add("BatchNormalization", [x, *map(graph.constant, arrays)], epsilon=layer.epsilon)


def _max_pooling(graph, layer, x):
    shape, strides = list(layer.pool_size), list(layer.strides)
    return graph.add("MaxPool", [x], kernel_shape=shape, strides=strides, **_padding(layer.padding))


def _dense(graph, layer, x):
    kernel, bias = _arrays(layer.kernel, layer.bias)
    return _activated(graph, layer, graph.add("Gemm", [x, graph.constant(kernel), graph.constant(bias)]))


_WRITERS = {
    "Activation": _activated,
    "Add": lambda graph, layer, *inputs: graph.add("Add", list(inputs)),
    "BatchNormalization": _batch_normalization,
    "Conv2D": _conv2d,
    "Dense": _dense,
    "GlobalAveragePooling2D": lambda graph, layer, x: graph.add("Flatten", [graph.add("GlobalAveragePool", [x])]),
    "MaxPooling2D": _max_pooling,
    "SeparableConv2D": _separable_conv2d,
}
