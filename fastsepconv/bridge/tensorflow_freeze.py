"""A Keras model as one TensorFlow graph whose weights are constants: what `freeze` does in TensorFlow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2_as_graph

from .. import checks
from .tensorflow_registration import DEFINITIONS

_PASSED_ON = ("Identity", "Cast")  # what may stand between a node and the one that its values come from


def as_constants(model: keras.Model) -> Callable[..., Any]:
    """A function of the inputs of a built model, as `freeze` returns it."""

    @tf.function(autograph=False)
    def graph(*tensors: tf.Tensor) -> Any:
        sequential = isinstance(model, keras.Sequential)
        inputs = tensors[0] if sequential else keras.tree.pack_sequence_as(model.input, tensors)
        return model(inputs, training=False)

    specs = [tf.TensorSpec(each.shape, each.dtype, name=f"input_{i}") for i, each in enumerate(model.inputs)]
    concrete = graph.get_concrete_function(*specs)
    _, definition = convert_variables_to_constants_v2_as_graph(concrete)
    for nodes in (definition.node, *(function.node_def for function in definition.library.function)):
        _keep_constants(nodes)
    _take_in_relus(definition.node)  # not in functions, whose results nobody counts as read
    names = [tensor.name for tensor in concrete.inputs[: len(specs)]]
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    frozen = imported.prune(names, [tensor.name for tensor in concrete.outputs])

    def predict(*inputs: Any) -> Any:
        if len(inputs) != len(specs):
            raise checks.invalid("inputs", f"{len(specs)} of them", len(inputs), " in number")
        values = [keras.ops.convert_to_tensor(each, spec.dtype.name) for each, spec in zip(inputs, specs, strict=True)]
        return tf.nest.pack_sequence_as(concrete.structured_outputs, frozen(*values))

    return predict


def _keep_constants(nodes: Sequence[NodeDef]) -> None:
    """Tell this package's nodes to keep a kernel packed that is a constant."""
    named = {node.name: node for node in nodes}
    for node in nodes:
        if "keep" in _attributes(node):
            kernel = node.input[len(DEFINITIONS[node.op].inputs) - 2]  # the bias comes last
            node.attr["keep"].i = int(_is_constant(kernel, named))


def _take_in_relus(nodes: Sequence[NodeDef]) -> None:
    """Have this package's nodes compute the ReLU that is the one reader of their result, rounded to halves or not."""
    named = {node.name: node for node in nodes}
    readers = Counter(name.partition(":")[0].lstrip("^") for node in nodes for name in node.input)
    for node in nodes:
        if node.op != "Relu":
            continue
        passed, source = _origin(node.input[0], named)
        if source is None or "relu" not in _attributes(source):
            continue
        if all(readers[each.name] == 1 for each in (*passed, source)):
            source.attr["relu"].i = 1
            node.op = "Identity"


def _attributes(node: NodeDef) -> Iterable[str]:
    return DEFINITIONS[node.op].attributes if node.op in DEFINITIONS else ()


def _is_constant(name: str, named: dict[str, NodeDef]) -> bool:
    _, source = _origin(name, named)
    return source is not None and source.op == "Const"


def _origin(name: str, named: dict[str, NodeDef]) -> tuple[list[NodeDef], NodeDef | None]:
    """What a tensor passes through, and the node that it comes from; None where that is an argument."""
    passed, node = [], named.get(name.partition(":")[0])
    while node is not None and node.op in _PASSED_ON:
        passed.append(node)
        node = named.get(node.input[0].partition(":")[0])
    return passed, node
