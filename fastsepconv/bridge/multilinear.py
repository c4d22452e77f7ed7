"""The gradients of an operation that is linear in each of its operands, to any order.

y = F(a_1, ..., a_k) + bias, linear in every a_i, and G(a_1, ..., a_k, dy) = (d_a_1, ..., d_a_k, d_bias), its gradients.
Since <u, G_i(a, dy)> = <F(a with u for a_i), dy>, whatever is to be known of G comes from F and G again: for
upstream gradients u_1, ..., u_k, b of what G returned,

    d_dy  = sum over i of F(a with u_i for a_i) + b
    d_a_j = sum over i other than j of G_j(a with u_i for a_i, dy)

Nothing here knows a framework: tensors are only added, and None stands for a gradient that is absent or not wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Tensor = Any
Forward = Callable[[Sequence[Tensor]], Tensor]
Backward = Callable[[Sequence[Tensor], Tensor, Sequence[bool]], Sequence[Tensor | None]]


def gradient_of_gradient(
    forward: Forward,
    backward: Backward,
    operands: Sequence[Tensor],
    dy: Tensor,
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of G's inputs, the operands and then dy, from those of its outputs, the operands' and the bias's.

    `forward(operands)` is F without bias; `backward(operands, dy, wanted)` is G, with None for what is not wanted.
    The bias's upstream gradient comes in the shape of dy.
    """
    *upstream, d_bias = upstream
    total: list[Tensor | None] = [None] * len(operands) + [d_bias if wanted[-1] else None]
    for i, u in enumerate(upstream):
        if u is None:
            continue
        replaced = [*operands[:i], u, *operands[i + 1 :]]
        if wanted[-1]:
            total[-1] = _add(total[-1], forward(replaced))
        others = [wanted[j] and j != i for j in range(len(operands))]
        if any(others):
            for j, part in enumerate(backward(replaced, dy, [*others, False])[:-1]):
                total[j] = _add(total[j], part)
    return total


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
