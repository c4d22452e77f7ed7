"""The operations as PyTorch knows them: custom operators, `fastsepconv::separable_conv2d` and its like.

An operation is named by its kind, "separable", "depthwise" or "pointwise". Its operands are x and the kernels, its
window the values of `static_shapes.window`. Tensors are channels-last and of one dtype, on one device.

Each operation has two operators, itself and its gradient (`.._grad`), so that PyTorch can trace gradients too and
differentiate them again. `torch.func` cannot differentiate an operator, though, and forward mode takes its derivative
for zero: where these are at work, the operator is called through an autograd function, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.library import CustomOpDef, custom_op

from . import torch_kernels
from .multilinear import gradient_of_gradient
from .torch_kernels import OPERANDS, Window

_WINDOW_SCHEMA = ", int[] strides, int[] dilations, bool same, int[] padding"

Context = Any
Gradients = list[torch.Tensor | None]


def forward(kind: str, operands: Sequence[torch.Tensor], bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The operation's output `[N,P,Q,F]`."""
    return _call(_OPERATIONS[kind].forward, (*operands, bias), window)


def backward(
    kind: str, operands: Sequence[torch.Tensor], dy: torch.Tensor, window: Window, wanted: Sequence[bool]
) -> Gradients:
    """The gradients of the operands and of the bias for the output's gradient dy; None for those not wanted."""
    gradients = _call(_OPERATIONS[kind].backward, (*operands, dy), (*window, tuple(wanted)))
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


class Operator(NamedTuple):
    """An operator, and the autograd function that calls it."""

    op: CustomOpDef
    function: type[torch.autograd.Function]


class Operation(NamedTuple):
    """An operation's output and its gradients."""

    forward: Operator
    backward: Operator


class _Constants(tuple):
    """An operator's arguments but for the tensors: to `torch.func`, which looks into plain tuples, a single one."""


def _call(operator: Operator, tensors: tuple, constants: tuple) -> Any:
    if torch.compiler.is_compiling() or not _transforms():
        return operator.op(*tensors, *constants)
    return operator.function.apply(*tensors, _Constants(constants))


def _spread(arguments: tuple) -> tuple:
    """The operator's arguments from those of the autograd function."""
    *tensors, last = arguments
    return (*tensors, *last) if isinstance(last, _Constants) else arguments


def _transforms() -> bool:
    """Whether `torch.func` or forward mode is at work; also where this PyTorch does not tell."""
    func = getattr(torch._C, "_are_functorch_transforms_active", None)
    return func is None or func() or getattr(forward_ad, "_current_level", 0) >= 0


def _define(kind: str) -> Operation:
    """Make an operation known to PyTorch: its kernels, its shapes, its derivatives."""
    operands = "".join(f"Tensor {name}, " for name in OPERANDS[kind])
    window = "" if kind == "pointwise" else _WINDOW_SCHEMA
    name, count = f"fastsepconv::{kind}_conv2d", len(OPERANDS[kind])
    results = ", ".join(["Tensor"] * (count + 1))

    @custom_op(name, mutates_args=(), schema=f"({operands}Tensor? bias{window}) -> Tensor")
    def compute(*arguments):
        operands, bias, window = arguments[:count], arguments[count], arguments[count + 1 :]
        return torch_kernels.forward(kind, operands, bias, _hashable(window))

    @compute.register_fake
    def _shape(*arguments):
        operands, bias, window = arguments[:count], arguments[count], arguments[count + 1 :]
        tensors = {**_named(kind, operands), "bias": bias}
        return operands[0].new_empty(torch_kernels.result_shape(kind, tensors, _hashable(window)))

    @custom_op(f"{name}_grad", mutates_args=(), schema=f"({operands}Tensor dy{window}, bool[] wanted) -> ({results})")
    def compute_grad(*arguments):
        operands, dy, (*window, wanted) = arguments[:count], arguments[count], arguments[count + 1 :]
        return tuple(torch_kernels.backward(kind, operands, dy, _hashable(window), wanted))

    @compute_grad.register_fake
    def _grad_shapes(*arguments):
        operands, dy, (*window, wanted) = arguments[:count], arguments[count], arguments[count + 1 :]
        torch_kernels.result_shape(kind, {**_named(kind, operands), "dy": dy}, _hashable(window))
        return tuple(map(dy.new_empty, torch_kernels.gradient_shapes(operands, dy, wanted)))

    return Operation(
        _differentiable(compute, count, count + 1, _gradient_of(kind), _tangent_of(kind)),
        _differentiable(
            compute_grad, count + 1, count + 1, _gradient_of_gradient_of(kind), _tangent_of_gradient_of(kind)
        ),
    )


def _named(kind: str, operands: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(OPERANDS[kind], operands, strict=True))


def _hashable(window: Sequence) -> Window:
    return tuple(tuple(part) if isinstance(part, list) else part for part in window)


def _differentiable(op: CustomOpDef, kept: int, tensors: int, gradient: Callable, tangent: Callable) -> Operator:
    """Tell PyTorch the derivatives of an operator; they depend on the first `kept` of its `tensors` tensors."""

    def keep(ctx: Context, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)  # what nobody used has no gradient, and costs nothing
        ctx.save_for_backward(*inputs[:kept])
        ctx.constants = inputs[tensors:]

    def keep_for_both(ctx: Context, inputs: tuple, output: Any) -> None:
        keep(ctx, _spread(inputs), output)
        ctx.save_for_forward(*inputs[:kept])

    def one_by_one(info: Any, in_dims: tuple, *arguments: Any) -> Any:
        """Under `torch.vmap`: a call for each member of the batch."""
        if info.batch_size == 0:
            raise ValueError("fastsepconv works off a batch of torch.vmap one by one. Expected members. Received: none")
        results = [
            op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    op.register_autograd(gradient, setup_context=keep)
    op.register_vmap(one_by_one)
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *arguments: op(*_spread(arguments))),
        "setup_context": staticmethod(keep_for_both),
        "backward": staticmethod(gradient),
        "jvp": staticmethod(tangent),
    }
    return Operator(op, type(op._name, (torch.autograd.Function,), members))


def _gradient_of(kind: str) -> Callable:
    def gradient(ctx: Context, dy: torch.Tensor | None) -> tuple:
        operands, window = ctx.saved_tensors, ctx.constants
        if dy is None:
            return _for_all_inputs(ctx, [])
        return _for_all_inputs(ctx, backward(kind, operands, dy, window, ctx.needs_input_grad[: len(operands) + 1]))

    return gradient


def _gradient_of_gradient_of(kind: str) -> Callable:
    def gradient(ctx: Context, *upstream: torch.Tensor | None) -> tuple:
        *operands, dy = ctx.saved_tensors
        *window, computed = ctx.constants
        given = [u if there else None for u, there in zip(upstream, computed, strict=True)]
        wanted = ctx.needs_input_grad[: len(operands) + 1]
        return _for_all_inputs(ctx, _second_order(kind, operands, dy, window, given, wanted))

    return gradient


def _for_all_inputs(ctx: Context, gradients: Gradients) -> tuple:
    """The gradients of the tensors, and None for each argument after them."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _tangent_of(kind: str) -> Callable:
    def tangent(ctx: Context, *tangents: torch.Tensor | None) -> torch.Tensor:
        operands, window = ctx.saved_tensors, ctx.constants
        count = len(operands)
        like_y = operands[0].new_empty(()).expand(torch_kernels.result_shape(kind, _named(kind, operands), window))
        only_y = [False] * count + [True]
        return _second_order(kind, operands, like_y, window, tangents[: count + 1], only_y)[-1]

    return tangent


def _tangent_of_gradient_of(kind: str) -> Callable:
    def tangent(ctx: Context, *tangents: torch.Tensor | None) -> tuple:
        *operands, dy = ctx.saved_tensors
        *window, computed = ctx.constants
        count = len(operands)
        gradients = _second_order(kind, operands, dy, window, [*tangents[:count], None], [*computed[:-1], False])
        if tangents[count] is not None:
            by_dy = backward(kind, operands, tangents[count], window, computed)
            gradients = [b if a is None else a if b is None else a + b for a, b in zip(gradients, by_dy, strict=True)]
        shapes = torch_kernels.gradient_shapes(operands, dy, computed)
        return tuple(dy.new_zeros(s) if d is None else d for d, s in zip(gradients, shapes, strict=True))

    return tangent


def _second_order(
    kind: str, operands: Sequence, dy: torch.Tensor, window: Window, given: Sequence, wanted: Sequence[bool]
) -> Gradients:
    """`gradient_of_gradient` of the operation."""
    if given[-1] is not None:
        given = [*given[:-1], given[-1].expand(dy.shape)]
    return gradient_of_gradient(
        lambda operands: forward(kind, operands, None, window),
        lambda operands, dy, wanted: backward(kind, operands, dy, window, wanted),
        operands,
        dy,
        given,
        wanted,
    )


_OPERATIONS = {kind: _define(kind) for kind in OPERANDS}
