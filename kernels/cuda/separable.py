"""Separable convolution, forward and backward: the depthwise and the pointwise kernels one after the other.

What lies between the two steps, mid `[N,P,Q,C*M]` and its gradient, stays on the card, in the element of the sums:
half types are rounded once, where the result is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from ..geometry import Geometry
from . import depthwise, pointwise
from .elements import sums_of
from .launch import Stream
from .memory import Operand, scratch

UNBOUNDED = (float("-inf"), float("inf"))


class Steps(NamedTuple):
    """What computes the two steps, and the element of what lies between them, given the data's."""

    depthwise_forward: Callable[..., None]
    depthwise_backward: Callable[..., None]
    pointwise_forward: Callable[..., None]
    pointwise_backward: Callable[..., None]
    between: Callable[[str], str]


PLAIN = Steps(depthwise.forward, depthwise.backward, pointwise.forward, pointwise.backward, sums_of)


def forward(
    g: Geometry,
    filters: int,
    x: Operand,
    depthwise_kernel: Operand,
    pointwise_kernel: Operand,
    bias: Operand | None,
    y: Operand,
    clamp,
    relu_x: bool,
    stream: Stream,
    steps: Steps = PLAIN,
) -> None:
    """Fills y `[N,P,Q,F]` from x `[N,H,W,C]`, kernels `[R,S,C,M]` and `[C*M,F]`, bias `[F]` or None."""
    rows, channels = mid_sizes(g)
    with scratch(rows * channels, steps.between(x.element), stream) as mid:
        steps.depthwise_forward(g, x, depthwise_kernel, None, mid, UNBOUNDED, relu_x, stream)
        steps.pointwise_forward(rows, channels, filters, mid, pointwise_kernel, bias, y, clamp, stream)


def backward(
    g: Geometry,
    filters: int,
    x: Operand,
    depthwise_kernel: Operand,
    pointwise_kernel: Operand,
    dy: Operand,
    dx: Operand | None,
    d_depthwise: Operand | None,
    d_pointwise: Operand | None,
    d_bias: Operand | None,
    stream: Stream,
    steps: Steps = PLAIN,
) -> None:
    """Fills dx, d_depthwise, d_pointwise and d_bias, each unless None, from dy `[N,P,Q,F]`; mid is computed again."""
    rows, channels = mid_sizes(g)
    with contextlib.ExitStack() as held:
        mid = d_mid = None
        if d_pointwise:
            mid = held.enter_context(scratch(rows * channels, steps.between(x.element), stream))
            steps.depthwise_forward(g, x, depthwise_kernel, None, mid, UNBOUNDED, False, stream)
        if dx or d_depthwise:
            d_mid = held.enter_context(scratch(rows * channels, steps.between(dy.element), stream))
        steps.pointwise_backward(
            rows, channels, filters, mid or x, pointwise_kernel, dy, d_mid, d_pointwise, d_bias, stream
        )
        if d_mid:
            steps.depthwise_backward(g, x, depthwise_kernel, d_mid, dx, d_depthwise, None, stream)


def mid_sizes(g: Geometry) -> tuple[int, int]:
    """The rows and columns of mid."""
    return g.batch * g.out_height * g.out_width, g.channels * g.multiplier
