"""The registered ops as Python functions: run eagerly or built into a graph, with gradients of any order.

An operation is named by its kind, "Depthwise", "Pointwise" or "Separable". Its operands are x and the kernels; its
attributes are alternating names and values, as TensorFlow's own op wrappers pass them.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import context, core, execute
from tensorflow.python.framework import op_def_library, ops

from . import tensorflow_card
from .multilinear import gradient_of_gradient
from .static_shapes import by_name, output_shape, static_shape
from .tensorflow_registration import DEFINITIONS, FROZEN, register

Attributes = tuple


def forward(kind: str, operands: Sequence[tf.Tensor], bias: tf.Tensor | None, attributes: Attributes) -> tf.Tensor:
    """The operation on channels-last tensors of one dtype, float32, float64 or bfloat16."""
    name = f"Fastsepconv{kind}"
    definition, given = DEFINITIONS[name], {"biases": [] if bias is None else [bias]}
    inputs = [*operands, *(given.get(length, []) for length in definition.lists)]
    if context.executing_eagerly():
        return _apply(name, inputs, attributes)[0]
    shapes = [static_shape(operand) for operand in operands]
    shape = output_shape(shapes, None if bias is None else static_shape(bias), by_name(attributes))
    # An op in a graph takes no defaults; `tensorflow_freeze` sets these later.
    unset = definition.attributes.keys() & FROZEN - set(definition.lists)
    (y,) = _apply_in_graph(name, inputs, attributes + tuple(part for attribute in unset for part in (attribute, 0)))
    y.set_shape(shape)
    return y


def backward(
    kind: str, operands: Sequence[tf.Tensor], dy: tf.Tensor, attributes: Attributes, wanted: Sequence[bool]
) -> list[tf.Tensor | None]:
    """The gradients of the operands and of the bias for the output's gradient dy; None for those not wanted."""
    if dy.dtype is tf.bfloat16:
        operands, dy = [tf.cast(operand, tf.float32) for operand in operands], tf.cast(dy, tf.float32)
        singles = backward(kind, operands, dy, attributes, wanted)
        return [None if gradient is None else tf.cast(gradient, tf.bfloat16) for gradient in singles]
    bits = sum(1 << i for i, want in enumerate(wanted) if want)
    eager = context.executing_eagerly()
    apply = _apply if eager else _apply_in_graph
    gradients = apply(f"Fastsepconv{kind}Grad", [*operands, dy], (*attributes, "wanted", bits))
    gradients = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    if not eager:
        for gradient, operand in zip(gradients, operands, strict=False):
            if gradient is not None:
                gradient.set_shape(operand.shape)
        if gradients[-1] is not None:
            gradients[-1].set_shape(dy.shape[-1:] if dy.shape.rank else [None])
    return gradients


def _apply(name: str, inputs: list, attributes: Attributes) -> Sequence[tf.Tensor]:
    """The outputs of the op `name`, run at once as TensorFlow's generated wrappers run theirs."""
    eager = context.context()
    with tensorflow_card.placement(inputs[0]):
        try:
            outputs = pywrap_tfe.TFE_Py_FastPathExecute(eager, name, None, *inputs, *attributes)
        except core._NotOkStatusException as error:
            ops.raise_from_not_ok_status(error, None)
        except core._FallbackException:
            return _apply_slowly(eager, name, inputs, attributes)
    return outputs if isinstance(outputs, list) else [outputs]


def _apply_slowly(eager: context.Context, name: str, inputs: list, attributes: Attributes) -> Sequence[tf.Tensor]:
    """The same where the fast path declines: before TensorFlow's eager context is set up, for one."""
    attributes = (*attributes, "T", inputs[0].dtype.as_datatype_enum)
    lists = DEFINITIONS[name].lists
    required, given = inputs[: len(inputs) - len(lists)], inputs[len(inputs) - len(lists) :]
    for length, values in zip(lists, given, strict=True):
        attributes += (length, len(values))
    inputs = [*required, *(value for values in given for value in values)]
    outputs = execute.execute(name.encode(), len(DEFINITIONS[name].outputs), inputs, attributes, eager)
    if execute.must_record_gradient():
        execute.record_gradient(name, inputs, attributes, outputs)
    return outputs


def _apply_in_graph(name: str, inputs: list, attributes: Attributes) -> Sequence[tf.Tensor]:
    """The outputs of a node of the op `name`, added to the graph that is being built."""
    named_inputs = {spec.split(":")[0]: value for spec, value in zip(DEFINITIONS[name].inputs, inputs, strict=True)}
    with tensorflow_card.placement(inputs[0]):
        *_, op, _ = op_def_library._apply_op_helper(name, **named_inputs, **by_name(attributes))
    if execute.must_record_gradient():
        execute.record_gradient(name, op.inputs, attributes, op.outputs)
    return op.outputs


def _attributes_of(op: tf.Operation) -> Attributes:
    """Those that an operation and its gradient share."""
    names = [name for name in DEFINITIONS[op.type].attributes if name not in FROZEN | {"wanted"}]
    return tuple(part for name in names for part in (name, op.get_attr(name)))


def _needed(op: tf.Operation) -> list[bool]:
    """Which inputs somebody wants a gradient of. Only the tape knows; without it, all."""
    skipped = getattr(op, "skip_input_indices", None) or ()
    return [i not in skipped for i in range(len(op.inputs))]


def _register_gradients(kind: str) -> None:
    operand_count = len(DEFINITIONS[f"Fastsepconv{kind}Grad"].inputs) - 1

    @ops.RegisterGradient(f"Fastsepconv{kind}")
    def _forward_gradient(op, dy):
        if isinstance(op, tf.Operation) and any(map(op.get_attr, DEFINITIONS[op.type].attributes.keys() & FROZEN)):
            raise LookupError(f"A frozen model has no gradients. One of {op.name} was asked for.")
        operands, has_bias = op.inputs[:operand_count], len(op.inputs) > operand_count
        needed = _needed(op)
        gradients = backward(kind, operands, dy, _attributes_of(op), needed if has_bias else [*needed, False])
        return gradients if has_bias else gradients[:-1]

    @ops.RegisterGradient(f"Fastsepconv{kind}Grad")
    def _backward_gradient(op, *upstream):
        *operands, dy = op.inputs
        attributes = _attributes_of(op)
        given = [u if op.get_attr("wanted") >> i & 1 else None for i, u in enumerate(upstream)]
        if given[-1] is not None:
            given[-1] = tf.broadcast_to(given[-1], tf.shape(dy))
        return gradient_of_gradient(
            lambda operands: forward(kind, operands, None, attributes),
            lambda operands, dy, wanted: backward(kind, operands, dy, attributes, wanted),
            operands,
            dy,
            given,
            _needed(op),
        )


tensorflow_card.register(register())
for _kind in ("Depthwise", "Pointwise", "Separable"):
    _register_gradients(_kind)
