"""Pointwise convolution in the fast tier, forward and backward, on tensor cores; arguments as in `pointwise`.

float32 is computed as three TF32 products, or as one where FASTSEPCONV_TF32=1 asks for it. The former make NaN of an
infinity in x or the kernel, where the plain kernels give an infinity. Half numbers and TF32 take Hopper's warpgroups on
cards of compute capability 9.0, where that costs less; TF32 not for the gradient of the kernel, and forward after the
kernel was transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from . import fast_kernels, pointwise_tensor, settings, sums, tiles, transposition
from .launch import Stream
from .memory import ABSENT, Operand, scratch
from .tiles import GemmTile


def serves(rows: int, channels: int, filters: int, *arguments: Any) -> bool:
    """Whether both passes can be computed for arrays like these."""
    return fast_kernels.takes(arguments) and fits(rows, channels, filters, arguments[0].element)


@lru_cache(tiles.CHOICES_KEPT)
def fits(rows: int, channels: int, filters: int, element: str) -> bool:
    """Whether there are tiles for these sizes: of half numbers, for even ones."""
    countable = fast_kernels.spans(rows, channels, filters) and fast_kernels.spans(channels, filters)
    return countable and tiles.copy_bytes(element, channels, filters) > 0


def forward(
    rows: int,
    channels: int,
    filters: int,
    x: Operand,
    kernel: Operand,
    bias: Operand | None,
    y: Operand,
    clamp,
    stream: Stream,
) -> None:
    """Fills y `[rows,F]` from x `[rows,K]`, kernel `[K,F]`, bias `[F]` or None."""
    which, added = product(x.element, rows, filters, (channels, filters), stream, channels), bias or ABSENT
    with _as_taken(which, channels, filters, kernel, stream) as w:
        fast_kernels.run(
            pointwise_tensor.forward, which, (rows, filters), stream,
            x.pointer, w.pointer, added.pointer, y.pointer, rows, filters, channels, int(bias is not None), *clamp,
        )  # fmt: skip


@contextmanager
def _as_taken(
    which: tuple[str, GemmTile], channels: int, filters: int, kernel: Operand, stream: Stream
) -> Iterator[Operand]:
    """The kernel as a forward product takes it: itself, or a transpose of it, rounded, that lasts as long as that."""
    if not tiles.takes_only_deep(*which):
        yield kernel
        return
    numbers, _ = which
    with scratch(channels * filters, kernel.element, stream) as transposed:
        fast_kernels.run(
            transposition.transpose, (numbers,), (channels, filters), stream,
            kernel.pointer, transposed.pointer, channels, filters,
        )  # fmt: skip
        yield transposed


def backward(
    rows: int,
    channels: int,
    filters: int,
    x: Operand,
    kernel: Operand,
    dy: Operand,
    dx: Operand | None,
    d_kernel: Operand | None,
    d_bias: Operand | None,
    stream: Stream,
) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[rows,F]`."""
    if dx:
        which = product(dy.element, rows, channels, (channels, filters), stream)
        fast_kernels.run(
            pointwise_tensor.input_gradient, which, (rows, channels), stream,
            dy.pointer, kernel.pointer, dx.pointer, rows, channels, filters,
        )  # fmt: skip
    if d_kernel:
        _kernel_gradient(rows, channels, filters, x, dy, d_kernel, stream)
    if d_bias:
        sums.over_rows(rows, filters, dy, d_bias, stream)


def _kernel_gradient(
    rows: int, channels: int, filters: int, x: Operand, dy: Operand, d_kernel: Operand, stream: Stream
) -> None:
    capability = stream.device.capability
    numbers, tile = _chosen(dy.element, lambda one: tiles.kernel_gradient(one, channels, filters, rows, capability))
    share = tiles.kernel_gradient_share(tile, channels, filters, rows)
    splits, weights = -(-rows // share), channels * filters
    with scratch(splits * weights, "float32", stream) as partials:
        fast_kernels.run(
            pointwise_tensor.kernel_gradient, (numbers, tile), (channels, filters, rows, share), stream,
            x.pointer, dy.pointer, partials.pointer, channels, filters, rows, share,
        )  # fmt: skip
        fast_kernels.add_partials(weights, splits, partials, d_kernel, stream)


def product(
    element: str, rows: int, columns: int, row_lengths: tuple[int, ...], stream: Stream, wide_depth: int = 0
) -> tuple[str, GemmTile]:
    """The numbers and the tile that compute a product of `rows` by `columns` on the stream's card.

    `wide_depth` as in `tiles.pointwise`.
    """
    capability = stream.device.capability
    return _chosen(
        element, lambda numbers: tiles.pointwise(numbers, rows, columns, row_lengths, capability, wide_depth)
    )


def _chosen(element: str, choose: Callable[[str], GemmTile | None]) -> tuple[str, GemmTile]:
    """What arrays of an element are multiplied as, and the tile that is chosen for it.

    Raises:
        ValueError: there is no tile, since `fits` was not asked.
    """
    wanted = ("tf32", element) if element == "float32" and settings.tf32() else (element,)
    for numbers in wanted:
        tile = choose(numbers)
        if tile:
            return numbers, tile
    raise ValueError(f"No tile takes these rows of {element}.")
