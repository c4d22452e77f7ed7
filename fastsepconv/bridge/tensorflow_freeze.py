"""A Keras model as one TensorFlow graph whose weights are constants: what `freeze` does in TensorFlow."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2_as_graph

from .. import checks
from . import tensorflow as bridge
from .tensorflow_registration import CARD, DEFINITIONS

ShapeOf = Callable[[str], list[int] | None]

_IN_TURN = "SINGLE_THREADED_EXECUTOR"  # TensorFlow's, which runs nodes on the thread that calls
_OF_CONTROL_FLOW = frozenset(("Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond"))
_A_BATCH = 97  # of images, and one more for each further input, for sizes that only equal batches have in common


def for_cpu_kernels() -> bool:
    """Whether a graph that is built now runs on the CPU's kernels: those for a card add no residuals, for one."""
    way = bridge.status()
    return (way["path"], way["backend"]) == ("c-api", "cpu") and not tf.config.list_logical_devices(CARD)


def as_constants(model: keras.Model) -> Callable[..., Any]:
    """A function of the inputs of a built model, as `freeze` returns it."""

    def graph(*tensors: tf.Tensor) -> Any:
        sequential = isinstance(model, keras.Sequential)
        inputs = tensors[0] if sequential else keras.tree.pack_sequence_as(model.input, tensors)
        return model(inputs, training=False)

    specs = [tf.TensorSpec(each.shape, each.dtype, name=f"input_{i}") for i, each in enumerate(model.inputs)]
    concrete = tf.function(graph, autograph=False).get_concrete_function(*specs)
    _, definition = convert_variables_to_constants_v2_as_graph(concrete)
    for nodes in (definition.node, *(function.node_def for function in definition.library.function)):
        _keep_constants(nodes)
    # Not in functions, whose results nobody counts as read.
    fuses = for_cpu_kernels()
    if fuses:
        _take_in_sums(definition.node, _shapes_of(graph, specs))
    _take_in_relus(definition.node)
    _take_in_relus_of_x(definition.node)
    names = [tensor.name for tensor in concrete.inputs[: len(specs)]]
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(definition, name=""), [])
    frozen = imported.prune(names, [tensor.name for tensor in concrete.outputs])
    executor = _IN_TURN if fuses and _may_run_in_turn(definition.node) else ""

    def predict(*inputs: Any) -> Any:
        if len(inputs) != len(specs):
            raise checks.invalid("inputs", f"{len(specs)} of them", len(inputs), " in number")
        values = [_tensor(each, spec.dtype) for each, spec in zip(inputs, specs, strict=True)]
        return tf.nest.pack_sequence_as(concrete.structured_outputs, _call(frozen, values, executor))

    return predict


def _call(frozen: Any, values: list[tf.Tensor], executor: str) -> Sequence[tf.Tensor]:
    """The outputs of a frozen graph. No gradients pass: what nodes have taken in has none.

    Called eagerly, the function of the graph is run itself, without the way round by what would record it on tapes:
    that takes 0.4 ms, as long as five layers of few pixels.
    """
    if not tf.executing_eagerly():
        return frozen(*(tf.stop_gradient(each) for each in values))
    values = [*values, *frozen.captured_inputs]
    if executor:
        # An error is raised by the other executor, which tells the node.
        with (
            contextlib.suppress(tf.errors.InvalidArgumentError),
            tf.experimental.function_executor_type(executor),
        ):
            return frozen.inference_fn.call_flat(*values)
    return frozen.inference_fn.call_flat(*values)


def _tensor(value: Any, dtype: tf.DType) -> tf.Tensor:
    if isinstance(value, tf.Tensor) and value.dtype is dtype:
        return value
    return tf.convert_to_tensor(keras.ops.convert_to_tensor(value, dtype.name))  # of a variable, what it holds


def _may_run_in_turn(nodes: Sequence[NodeDef]) -> bool:
    """Whether no node has to wait for another that TensorFlow would start beside it.

    Nodes wait so where parts of the graph lie on several devices (which its arguments alone may bring about), in the
    loops and conditions of a graph, and in functions that stay a call. In turn each node has all cores, to which the
    kernels spread anyway; two at once hold each other up (2 to 3 % of Xception on 2 cores), and the first would wait
    for a thread of TensorFlow's to wake.
    """
    if len(tf.config.list_logical_devices()) > 1:
        return False
    return not any(node.op in _OF_CONTROL_FLOW or _calls(node) for node in nodes)


def _calls(node: NodeDef) -> bool:
    return any(attribute.HasField("func") or attribute.list.func for attribute in node.attr.values())


def _keep_constants(nodes: Sequence[NodeDef]) -> None:
    """Tell this package's nodes to keep a kernel packed that is a constant."""
    named = _by_name(nodes)
    for node in nodes:
        if "keep" in _attributes(node):
            kernel = node.input[_operands(node) - 1]
            node.attr["keep"].i = int(_is_constant(kernel, named))


def _shapes_of(function: Callable, specs: Sequence[tf.TensorSpec]) -> ShapeOf:
    """Tells the shape that a tensor of `function`'s graph has for some batch; None where it is not known.

    The sizes of two batches that are unknown may differ, and be broadcast: a batch of a size of its own tells.
    """
    sized = [
        tf.TensorSpec([_A_BATCH + i, *spec.shape[1:]], spec.dtype, spec.name) if spec.shape.rank else spec
        for i, spec in enumerate(specs)
    ]

    @functools.cache
    def graph() -> tf.Graph:  # traced where the first sum is found that could be taken in
        try:
            return tf.function(function, autograph=False).get_concrete_function(*sized).graph
        except Exception:  # such a batch cannot be computed, for whatever reason the model has
            return tf.Graph()

    def shape_of(name: str) -> list[int] | None:
        try:
            shape = graph().get_tensor_by_name(name if ":" in name else f"{name}:0").shape
        except (KeyError, ValueError):
            return None
        return shape.as_list() if shape.is_fully_defined() else None

    return shape_of


def _take_in_sums(nodes: Sequence[NodeDef], shape_of: ShapeOf) -> None:
    """Have this package's nodes add what is added to their result, where nothing else reads that: a residual."""
    named, readers = _by_name(nodes), _reader_counts(nodes)
    for node in nodes:
        if node.op not in ("Add", "AddV2") or len(node.input) != 2:
            continue
        for name, residual in (node.input, reversed(node.input)):
            passed, source = _origin(name, named)
            if source is None or "residuals" not in _attributes(source) or any(each.op == "Cast" for each in passed):
                continue
            unset = source.attr["residuals"].i == source.attr["relu"].i == 0
            unread = all(readers[each.name] == 1 for each in (*passed, source))
            if unset and unread and shape_of(name) is not None and shape_of(name) == shape_of(residual):
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


def _passes_on(node: NodeDef) -> bool:
    """Whether a node has the values of its input, as they are or rounded: a ReLU may change places with it."""
    floating = all(tf.as_dtype(node.attr[side].type).is_floating for side in ("SrcT", "DstT") if node.op == "Cast")
    return node.op == "Identity" or (node.op == "Cast" and floating)


def _origin(name: str, named: dict[str, NodeDef]) -> tuple[list[NodeDef], NodeDef | None]:
    """What a tensor passes through, and the node that it comes from; None where that is an argument."""
    passed, node = [], named.get(name.partition(":")[0])
    while node is not None and _passes_on(node):
        passed.append(node)
        node = named.get(node.input[0].partition(":")[0])
    return passed, node
