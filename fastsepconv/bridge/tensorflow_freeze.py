"""A Keras model as one TensorFlow graph whose weights are constants, for prediction: `freeze`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2_as_graph

from .. import checks
from .tensorflow_registration import DEFINITIONS

_PASSED_ON = ("Identity", "Cast")  # what may stand between a constant and the node that reads it


def freeze(model: keras.Model) -> Callable[..., Any]:
    """The model for prediction, with its weights as they are now.

    TensorFlow folds what can be computed beforehand (batch normalisation's factors, for one), and each of this
    package's convolutions packs its pointwise kernel at the first run and keeps it: as much memory again as those
    kernels. Later changes of the model do not show.

    Args:
        model: any built Functional or Sequential model, or one that has been called on symbolic inputs, on Keras with
            TensorFlow.

    Returns:
        A function of the model's inputs, tensors or arrays of any batch size, each an argument. What it returns is
        that of `model(inputs, training=False)`. It has no gradients.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: the model has not been built.
        RuntimeError: Keras does not run on TensorFlow.

    Source: TensorFlow's frozen graphs (tensorflow/python/framework/convert_to_constants.py).
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(f"freeze needs Keras on TensorFlow. It runs on {keras.backend.backend()}.")
    if not isinstance(model, keras.Model):
        raise checks.invalid("model", "a Keras model", type(model).__name__, kind=TypeError)
    wanted = getattr(model, "inputs", None)
    if not wanted:
        raise checks.invalid("model", "a model that knows its inputs", f"{model.name}, which has not been built")
    graph = tf.function(lambda *tensors: model(_structured(model, tensors), training=False), autograph=False)
    specs = [tf.TensorSpec(each.shape, each.dtype, name=f"input_{i}") for i, each in enumerate(wanted)]
    concrete = graph.get_concrete_function(*specs)
    _, definition = convert_variables_to_constants_v2_as_graph(concrete)
    _keep_constants(definition)
    names = [tensor.name for tensor in concrete.inputs[: len(specs)]]
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    frozen = imported.prune(names, [tensor.name for tensor in concrete.outputs])

    def predict(*inputs: Any) -> Any:
        if len(inputs) != len(specs):
            raise checks.invalid("inputs", f"{len(specs)} of them", len(inputs), " in number")
        values = [keras.ops.convert_to_tensor(each, spec.dtype.name) for each, spec in zip(inputs, specs, strict=True)]
        return tf.nest.pack_sequence_as(concrete.structured_outputs, frozen(*values))

    return predict


def _structured(model: keras.Model, tensors: tuple) -> Any:
    """A model's inputs as it takes them."""
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _keep_constants(graph: GraphDef) -> None:
    """Tell this package's nodes, in the graph and in its functions, to keep a kernel packed that is a constant."""
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        named = {node.name: node for node in nodes}
        for node in nodes:
            definition = DEFINITIONS.get(node.op)
            if definition and "keep" in definition.attributes:
                kernel = node.input[len(definition.inputs) - 2]  # the bias comes last
                node.attr["keep"].i = int(_is_constant(kernel, named))


def _is_constant(name: str, named: dict[str, NodeDef]) -> bool:
    node = named.get(name.partition(":")[0])
    while node is not None and node.op in _PASSED_ON:
        node = named.get(node.input[0].partition(":")[0])
    return node is not None and node.op == "Const"
