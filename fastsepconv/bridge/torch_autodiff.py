"""Gradients of Keras models on PyTorch, for `verify`: the functions of `tensorflow_autodiff`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch


def gradients(function: Callable[[Any], tuple[Any, Any]], x: Any, variables: Sequence[Any]) -> tuple[Any, list[Any]]:
    """`function(x)` is (outputs, loss): the outputs, and the loss's gradients of the variables, then of x.

    x may be nested; its integer tensors have no gradient. What the loss does not depend on has one of zeros.
    """
    x = keras.tree.map_structure(_leaf, x)
    sources = [variable.value for variable in variables]
    sources += [tensor for tensor in keras.tree.flatten(x) if tensor.requires_grad]
    outputs, loss = function(x)
    if not (sources and loss.requires_grad):
        return outputs, [torch.zeros_like(source) for source in sources]
    found = torch.autograd.grad(loss, sources, allow_unused=True)
    return outputs, [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]


def _leaf(value: Any) -> torch.Tensor:
    """`value` as a tensor that gradients end at, if it is floating."""
    tensor = keras.ops.convert_to_tensor(value).detach()
    return tensor.requires_grad_(tensor.is_floating_point())


def eager() -> bool:
    """Whether tensors have values now, and are not traced into a graph."""
    return not torch.compiler.is_compiling()


def passing(tensor: torch.Tensor, value: torch.Tensor, note: Callable[[Any], None]) -> torch.Tensor:
    """`value` in the forward pass; in the backward pass the gradient goes to `tensor`, and to `note`."""
    return _Passing.apply(tensor, value.detach(), note)  # of the graph that made `value` nothing is to run


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, value: torch.Tensor, note: Callable[[Any], None]) -> torch.Tensor:
        ctx.note = note
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        ctx.note(gradient)
        return gradient, None, None
