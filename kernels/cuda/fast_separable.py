"""Separable convolution in the fast tier, forward and backward; arguments as in `separable`.

Forward it is one kernel for half numbers, where all channels of a block's pixels fit its shared memory and pixels are
enough for blocks that take all filters; else, and backward, the depthwise and the pointwise kernels one after the
other. What lies between the two steps, mid `[N,P,Q,C*M]` and its gradient, has the data's element, which tensor cores
take: half numbers are rounded there as well. A depthwise step that has no window in registers is the plain tier's; the
pointwise step is always on tensor cores.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from ..geometry import Geometry
from . import depthwise, fast_depthwise, fast_kernels, fast_pointwise, separable, separable_rows
from .launch import Stream
from .memory import ABSENT, Operand
from .tiles import SeparableTile

# What mid's way to memory and back costs a pixel, in products of a pixel and a filter on one multiprocessor: for each
# channel, 4 bytes at 3.3 TB/s against 2 operations at 60 % of 990 TFLOP/s / 132, the nominal speeds of an H100.
MID_COST = 2.7


def serves(g: Geometry, filters: int, *arguments: Any) -> bool:
    """Whether both passes can be computed for arrays like these."""
    return fast_kernels.takes(arguments) and fast_pointwise.fits(*separable.mid_sizes(g), filters, arguments[0].element)


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
) -> None:
    """Fills y `[N,P,Q,F]` from x `[N,H,W,C]`, kernels `[R,S,C,M]` and `[C*M,F]`, bias `[F]` or None."""
    tile = _fused(g, filters, x.element, stream)
    if tile is None:
        separable.forward(g, filters, x, depthwise_kernel, pointwise_kernel, bias, y, clamp, relu_x, stream, FAST)
        return
    tile = tile.after_relu() if relu_x else tile
    rows, channels = separable.mid_sizes(g)
    added, window = bias or ABSENT, tile.window
    fast_kernels.run(
        separable_rows.forward, (x.element, tile), (rows, channels), stream,
        x.pointer, depthwise_kernel.pointer, pointwise_kernel.pointer, added.pointer, y.pointer,
        rows, g.height, g.width, channels, filters, g.out_height, g.out_width, g.pad_top, g.pad_left,
        window.groups(g.out_width), window.segments(g.out_width), int(bias is not None), *clamp,
    )  # fmt: skip


def _depthwise_forward(*arguments: Any) -> None:
    step: ModuleType = fast_depthwise if fast_depthwise.serves_forward(*arguments) else depthwise
    step.forward(*arguments)


def _depthwise_backward(*arguments: Any) -> None:
    step: ModuleType = fast_depthwise if fast_depthwise.serves_backward(*arguments) else depthwise
    step.backward(*arguments)


FAST = separable.Steps(
    _depthwise_forward, _depthwise_backward, fast_pointwise.forward, fast_pointwise.backward, lambda element: element
)
backward = partial(separable.backward, steps=FAST)


def _fused(g: Geometry, filters: int, element: str, stream: Stream) -> SeparableTile | None:
    """The tile that computes both steps in one kernel on this card, if there is one and two kernels cost more."""
    if fast_depthwise.forward_tile(g, element) is None:
        return None
    rows, channels = separable.mid_sizes(g)
    taps, strides = (g.kernel_height, g.kernel_width), (g.stride_height, g.stride_width)
    tile = separable_rows.choose(element, taps, strides, rows, channels, filters, stream.device.shared_limit)
    if tile is None:
        return None
    fused = tile.gemm.cost(rows, tile.gemm.columns) * -(-filters // tile.gemm.columns)
    _, product = fast_pointwise.product(element, rows, filters, (channels, filters), stream, channels)
    return tile if fused <= product.cost(rows, filters) + MID_COST * rows else None
