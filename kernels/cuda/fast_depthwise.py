"""Depthwise convolution in the fast tier, forward and backward, with the window in registers.

Arguments as in `depthwise`. For 3x3 taps without dilation or multiplier, of stride 1 or 2. What lies outside of the
image is multiplied as zero: a tap that is infinite makes NaN of the outputs along the border, and an infinity in dy
makes NaN of gradients of the kernel, where the plain kernels leave out what is outside.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache

from ..geometry import Geometry
from . import depthwise_window, fast_kernels, sums, tiles
from .launch import Stream
from .memory import ABSENT, Operand, scratch
from .tiles import WindowTile


def serves_forward(
    g: Geometry, x: Operand, kernel: Operand, bias: Operand | None, y: Operand, clamp, relu_x: bool, stream: Stream
) -> bool:
    """Whether `forward` can take these."""
    return fast_kernels.takes((x, kernel, bias, y)) and forward_tile(g, x.element) is not None


def serves_backward(
    g: Geometry,
    x: Operand,
    kernel: Operand,
    dy: Operand,
    dx: Operand | None,
    d_kernel: Operand | None,
    d_bias: Operand | None,
    stream: Stream,
) -> bool:
    """Whether `backward` can take these."""
    taken = fast_kernels.takes((x, kernel, dy, dx, d_kernel, d_bias))
    return taken and _backward_tile(g, x.element) is not None


@lru_cache(tiles.CHOICES_KEPT)
def forward_tile(g: Geometry, element: str, relu_x: bool = False) -> WindowTile | None:
    """The forward tile of a geometry; None where it is the plain tier's."""
    tile = tiles.depthwise_forward(element, *_taps_and_strides(g), g.channels) if _countable(g) else None
    return tile._replace(relu=True) if tile and relu_x else tile


@lru_cache(tiles.CHOICES_KEPT)
def _backward_tile(g: Geometry, element: str) -> WindowTile | None:
    return tiles.depthwise_backward(element, *_taps_and_strides(g), g.channels) if _countable(g) else None


def _taps_and_strides(g: Geometry) -> tuple[tuple[int, int], tuple[int, int]]:
    return (g.kernel_height, g.kernel_width), (g.stride_height, g.stride_width)


def _countable(g: Geometry) -> bool:
    """Whether kernels can count in a geometry, which has neither multiplier nor dilation."""
    pixels = g.batch * g.height * g.width, g.batch * g.out_height * g.out_width
    plain = g.multiplier == g.dilation_height == g.dilation_width == 1
    return plain and all(fast_kernels.spans(count, g.channels) for count in pixels)


def forward(
    g: Geometry, x: Operand, kernel: Operand, bias: Operand | None, y: Operand, clamp, relu_x: bool, stream: Stream
) -> None:
    """Fills y `[N,P,Q,C]` from x `[N,H,W,C]`, kernel `[R,S,C,1]`, bias `[C]` or None."""
    tile, added, rows = _known(forward_tile(g, x.element, relu_x)), bias or ABSENT, g.batch * g.out_height
    fast_kernels.run(
        depthwise_window.forward, (x.element, tile), (rows, g.channels, g.out_width), stream,
        x.pointer, kernel.pointer, added.pointer, y.pointer,
        rows, g.height, g.width, g.channels, g.out_height, g.out_width, g.pad_top, g.pad_left,
        tile.groups(g.out_width), tile.segments(g.out_width), tile.channel_bits(g.channels),
        int(bias is not None), *clamp,
    )  # fmt: skip


def backward(
    g: Geometry,
    x: Operand,
    kernel: Operand,
    dy: Operand,
    dx: Operand | None,
    d_kernel: Operand | None,
    d_bias: Operand | None,
    stream: Stream,
) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[N,P,Q,C]`.

    One kernel computes dx and d_kernel; the one that is not wanted goes to scratch memory.
    """
    if dx or d_kernel:
        _both_gradients(g, x, kernel, dy, dx, d_kernel, stream)
    if d_bias:
        sums.over_rows(g.batch * g.out_height * g.out_width, g.channels, dy, d_bias, stream)


def _both_gradients(
    g: Geometry, x: Operand, kernel: Operand, dy: Operand, dx: Operand | None, d_kernel: Operand | None, stream: Stream
) -> None:
    tile = _known(_backward_tile(g, x.element))
    bands = g.batch * tiles.bands_of(g.height, g.pad_top, tile.stride)
    plan = tile.gradient_plan(bands, g.channels, g.width)
    weights = g.kernel_height * g.kernel_width * g.channels
    with contextlib.ExitStack() as held:
        partials = held.enter_context(scratch(plan.splits * weights, "float32", stream))
        target = dx or held.enter_context(scratch(g.batch * g.height * g.width * g.channels, x.element, stream))
        fast_kernels.run(
            depthwise_window.backward, (x.element, tile), (bands, g.channels, g.width), stream,
            x.pointer, kernel.pointer, dy.pointer, target.pointer, partials.pointer,
            bands, g.height, g.width, g.channels, g.out_height, g.out_width, g.pad_top, g.pad_left,
            plan.groups, plan.share, plan.channel_bits, plan.strip,
        )  # fmt: skip
        if d_kernel:
            fast_kernels.add_partials(weights, plan.splits, partials, d_kernel, stream)


def _known(tile: WindowTile | None) -> WindowTile:
    """The tile, which `serves_forward` or `serves_backward` has found to exist."""
    if tile is None:
        raise ValueError("No tile takes a depthwise convolution of this geometry.")
    return tile
