"""The operations as PyTorch knows them: custom operators, `fastsepconv::separable_conv2d` and so on, each with a `_grad`.

An operation is named by its kind, "separable", "depthwise" or "pointwise". Its operands are x and the kernels; its
window is the values of `static_shapes.window`, in that order, and empty for a pointwise convolution. Tensors are
channels-last and of one dtype, on one device. Gradients are operators too, so that PyTorch can trace and
differentiate them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.library import CustomOpDef, custom_op

from . import torch_kernels
from .multilinear import gradient_of_gradient
from .static_shapes import Attributes
from .torch_kernels import OPERANDS

_ATTRIBUTES = ("strides", "dilations", "same", "padding")
_WINDOW_SCHEMA = ", int[] strides, int[] dilations, bool same, int[] padding"


class Operators(NamedTuple):
    """An operation's two operators."""

    forward: CustomOpDef
    backward: CustomOpDef


def forward(kind: str, operands: Sequence[torch.Tensor], bias: torch.Tensor | None, window: Sequence) -> torch.Tensor:
    """The operation's output `[N,P,Q,F]`."""
    return OPERATORS[kind].forward(*operands, bias, *window)


def backward(
    kind: str, operands: Sequence[torch.Tensor], dy: torch.Tensor, window: Sequence, wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The gradients of the operands and of the bias for the output's gradient dy; None for those not wanted."""
    gradients = OPERATORS[kind].backward(*operands, dy, *window, list(wanted))
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def _define(kind: str) -> Operators:
    """Make an operation known to PyTorch: its kernels, its shapes, its derivatives."""
    operands = [f"Tensor {name}" for name in OPERANDS[kind]]
    window = "" if kind == "pointwise" else _WINDOW_SCHEMA
    name, count = f"fastsepconv::{kind}_conv2d", len(operands)
    takes = ", ".join([*operands, "Tensor? bias"]) + window
    schema = f"({takes}) -> Tensor"
    takes = ", ".join([*operands, "Tensor dy"]) + f"{window}, bool[] wanted"
    grad_schema = f"({takes}) -> ({', '.join(['Tensor'] * (count + 1))})"

    @custom_op(name, mutates_args=(), schema=schema)
    def compute(*arguments):
        operands, bias, window = arguments[:count], arguments[count], arguments[count + 1 :]
        return torch_kernels.forward(kind, operands, bias, _attributes(window))

    @compute.register_fake
    def _shape(*arguments):
        tensors = dict(zip((*OPERANDS[kind], "bias"), arguments, strict=False))
        return arguments[0].new_empty(torch_kernels.result_shape(kind, tensors, _attributes(arguments[count + 1 :])))

    @custom_op(f"{name}_grad", mutates_args=(), schema=grad_schema)
    def compute_grad(*arguments):
        operands, dy, (*window, wanted) = arguments[:count], arguments[count], arguments[count + 1 :]
        return tuple(torch_kernels.backward(kind, operands, dy, _attributes(window), wanted))

    @compute_grad.register_fake
    def _grad_shapes(*arguments):
        operands, dy, (*window, wanted) = arguments[:count], arguments[count], arguments[count + 1 :]
        tensors = dict(zip((*OPERANDS[kind], "dy"), arguments, strict=False))
        torch_kernels.result_shape(kind, tensors, _attributes(window))
        return tuple(map(dy.new_empty, torch_kernels.gradient_shapes(operands, dy, wanted)))

    compute.register_autograd(_gradient_of(kind), setup_context=_keep(count))
    compute_grad.register_autograd(_gradient_of_gradient_of(kind), setup_context=_keep(count + 1))
    return Operators(compute, compute_grad)


def _attributes(window: Sequence) -> Attributes:
    return dict(zip(_ATTRIBUTES, window, strict=False))


def _keep(count: int):
    """What autograd's context holds of an operator's arguments: the tensors, and the others as `ctx.others`."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)  # an output that nobody used has no gradient, and costs nothing
        ctx.save_for_backward(*inputs[:count])
        ctx.others = inputs[count:]

    return setup_context


def _gradient_of(kind: str):
    def gradient(ctx: Any, dy: torch.Tensor | None) -> tuple:
        _, *window = ctx.others  # the bias, which no gradient depends on, and the window
        wanted = ctx.needs_input_grad[: len(ctx.saved_tensors) + 1]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        return *backward(kind, ctx.saved_tensors, dy, window, wanted), *[None] * len(window)

    return gradient


def _gradient_of_gradient_of(kind: str):
    def gradient(ctx: Any, *upstream: torch.Tensor | None) -> tuple:
        *operands, dy = ctx.saved_tensors
        *window, computed = ctx.others
        given = [u if there else None for u, there in zip(upstream, computed, strict=True)]
        if given[-1] is not None:
            given[-1] = given[-1].expand(dy.shape)
        gradients = gradient_of_gradient(
            lambda operands: forward(kind, operands, None, window),
            lambda operands, dy, wanted: backward(kind, operands, dy, window, wanted),
            operands,
            dy,
            given,
            ctx.needs_input_grad[: len(operands) + 1],
        )
        return *gradients, *[None] * len(ctx.others)

    return gradient


OPERATORS = {kind: _define(kind) for kind in OPERANDS}
