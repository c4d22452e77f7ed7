"""A Keras model as one TensorFlow graph whose weights are constants: what `freeze` does in TensorFlow."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2_as_graph

from .. import checks
from . import tensorflow as bridge
from . import tensorflow_card
from .tensorflow_registration import DEFINITIONS

ShapeOf = Callable[[str], tf.TensorShape]

_PASSED_ON = ("Identity", "Cast")  # what may stand between a node and the one that its values come from


def for_cpu_kernels() -> bool:
    """Whether a graph that is built now runs on the CPU's kernels: those for a card add no residuals, for one."""
    way = bridge.status()
    return (way["path"], way["backend"]) == ("c-api", "cpu") and not tensorflow_card.serves()


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
    # Not in functions, whose results nobody counts as read.
    fuses = for_cpu_kernels()
    if fuses:
        _take_in_sums(definition.node, lambda name: _static_shape(concrete.graph, name, one_batch=len(specs) == 1))
    _take_in_relus(definition.node)
    if fuses:
        _take_in_relus_of_x(definition.node)
    names = [tensor.name for tensor in concrete.inputs[: len(specs)]]
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    frozen = imported.prune(names, [tensor.name for tensor in concrete.outputs])

    def predict(*inputs: Any) -> Any:
        if len(inputs) != len(specs):
            raise checks.invalid("inputs", f"{len(specs)} of them", len(inputs), " in number")
        values = [keras.ops.convert_to_tensor(each, spec.dtype.name) for each, spec in zip(inputs, specs, strict=True)]
        values = [tf.stop_gradient(each) for each in values]  # what nodes have taken in has none
        return tf.nest.pack_sequence_as(concrete.structured_outputs, frozen(*values))

    return predict


def _keep_constants(nodes: Sequence[NodeDef]) -> None:
    """Tell this package's nodes to keep a kernel packed that is a constant."""
    named = _by_name(nodes)
    for node in nodes:
        if "keep" in _attributes(node):
            kernel = node.input[_operands(node) - 1]
            node.attr["keep"].i = int(_is_constant(kernel, named))


def _static_shape(graph: tf.Graph, name: str, one_batch: bool) -> tf.TensorShape:
    """The shape of a tensor of `graph`; that of a scalar where sizes are not known.

    The size of the batch need not be, where there is but `one_batch`.
    """
    try:
        shape = graph.get_tensor_by_name(name if ":" in name else f"{name}:0").shape
    except (KeyError, ValueError):
        return tf.TensorShape([])
    known = shape.rank and shape[1 if one_batch else 0 :].is_fully_defined()
    return shape if known else tf.TensorShape([])


def _take_in_sums(nodes: Sequence[NodeDef], shape_of: ShapeOf) -> None:
    """Have this package's nodes add what is added to their result, where nothing else reads that: a residual."""
    named, readers = _by_name(nodes), _reader_counts(nodes)
    for node in nodes:
        if node.op not in ("Add", "AddV2") or len(node.input) != 2:
            continue
        shape, other_shape = (shape_of(name) for name in node.input)
        if shape.rank != 4 or shape.as_list() != other_shape.as_list():
            continue
        for name, residual in (node.input, reversed(node.input)):
            passed, source = _origin(name, named)
            if source is None or "residuals" not in _attributes(source) or any(each.op == "Cast" for each in passed):
                continue
            unset = source.attr["residuals"].i == source.attr["relu"].i == 0
            if unset and all(readers[each.name] == 1 for each in (*passed, source)):
                source.attr["residuals"].i = 1
                source.input.insert(_operands(source) + source.attr["biases"].i, residual)
                node.op = "Identity"
                node.input[:] = [name]
                break


def _take_in_relus_of_x(nodes: Sequence[NodeDef]) -> None:
    """Have this package's nodes compute the ReLU of their x, where all that reads it are such nodes."""
    named, readers = _by_name(nodes), _reader_counts(nodes)
    takers = defaultdict(list)
    for node in nodes:
        if "relu_x" in _attributes(node):
            passed, source = _origin(node.input[0], named)
            if source is not None and source.op == "Relu" and all(readers[each.name] == 1 for each in passed):
                takers[source.name].append((node, passed[-1] if passed else node))
    for name, found in takers.items():
        if readers[name] == len(found):
            for node, reader in found:
                node.attr["relu_x"].i = 1
                reader.input[0] = named[name].input[0]


def _take_in_relus(nodes: Sequence[NodeDef]) -> None:
    """Have this package's nodes compute the ReLU that is the one reader of their result, rounded to halves or not."""
    named, readers = _by_name(nodes), _reader_counts(nodes)
    for node in nodes:
        if node.op != "Relu":
            continue
        passed, source = _origin(node.input[0], named)
        if source is None or "relu" not in _attributes(source):
            continue
        if all(readers[each.name] == 1 for each in (*passed, source)):
            source.attr["relu"].i = 1
            node.op = "Identity"


def _by_name(nodes: Sequence[NodeDef]) -> dict[str, NodeDef]:
    return {node.name: node for node in nodes}


def _reader_counts(nodes: Sequence[NodeDef]) -> Counter[str]:
    return Counter(name.partition(":")[0].lstrip("^") for node in nodes for name in node.input)


def _attributes(node: NodeDef) -> Iterable[str]:
    return DEFINITIONS[node.op].attributes if node.op in DEFINITIONS else ()


def _operands(node: NodeDef) -> int:
    """How many inputs of a node of this package's are x and kernels; lists come after them."""
    definition = DEFINITIONS[node.op]
    return len(definition.inputs) - len(definition.lists)


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
