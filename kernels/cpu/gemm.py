"""The matrix product behind the pointwise step: how it is cut into blocks, tiles and shares of work.

    y[m,f] = clamp(start[f] + sum over k of a[m,k] * kernel[k,f])

The blocking is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008) with one level
less, since the whole depth is summed in registers: a block of a, in padded rows, stays in L2; panels of the kernel
stream past it, each read by every tile of rows of the block.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .memory import ceil_div, share
from .microkernel import CACHE_LINE, GEMM_ROWS, gemm_columns, gemm_tile
from .packing import pack, pack_panel, packed_length

TILE_ROWS = GEMM_ROWS[0]
BLOCK_BYTES = 720 * 1024  # a block of a that stays in an L2 of 1 MiB beside a panel of the kernel
BLOCK_TILES = 32  # more rows than that would cost more in address translation than they save
STREAMED_BYTES = 24 << 20  # an output larger than that is gone from the caches before anyone reads it
LEAST_TILES = (
    8  # a worker with fewer tiles of rows would spend its time on reading the kernel: filters are split instead
)


@kernel
def padded_row(dtype, depth):
    """Elements from row to row of a block of a: whole cache lines, and never a multiple of 4 KiB.

    Rows a multiple of 4 KiB apart share one set of L1, which has fewer ways than the tile has rows.
    """
    line = CACHE_LINE // np.empty(0, dtype).itemsize
    return (ceil_div(depth, line) | 1) * line


@kernel
def panel_length(dtype, depth):
    """Elements of one panel of the kernel."""
    return depth * gemm_columns(dtype)


@kernel
def tile_height(rows):
    """The lowest tile that holds `rows` rows."""
    best = TILE_ROWS
    for height in GEMM_ROWS:
        if height >= rows:
            best = height
    return best


@kernel
def _row_parts(rows, workers):
    """Into how many parts the rows are split; `workers` is a multiple of it."""
    parts = workers
    while parts > 1 and (workers % parts != 0 or ceil_div(rows, TILE_ROWS) < parts * LEAST_TILES):
        parts -= 1
    return parts


@kernel
def work(dtype, rows, filters, worker, workers):
    """A worker's share: (first tile of rows, past the last, first filter, past the last)."""
    width = gemm_columns(dtype)
    parts = _row_parts(rows, workers)
    first, last = share(ceil_div(rows, TILE_ROWS), worker % parts, parts)
    f_first, f_last = share(ceil_div(filters, width), worker // parts, workers // parts)
    return first, last, f_first * width, min(f_last * width, filters)


@kernel
def _most_tiles(dtype, depth):
    fitting = BLOCK_BYTES // (TILE_ROWS * padded_row(dtype, depth) * np.empty(0, dtype).itemsize)
    return min(max(1, fitting), BLOCK_TILES)


@kernel
def block_tiles(dtype, depth, tiles):
    """Tiles of rows in a block: as many as L2 holds, the blocks of a worker's `tiles` tiles about equal."""
    return max(1, ceil_div(tiles, max(1, ceil_div(tiles, _most_tiles(dtype, depth)))))


@kernel
def _shares_panels(dtype, rows, depth, workers):
    """Whether packed panels serve several blocks. If each serves one, a worker packs its own, in its L2, as it goes."""
    tiles = ceil_div(ceil_div(rows, TILE_ROWS), _row_parts(rows, workers))
    return tiles > _most_tiles(dtype, depth)


@kernel
def shared_length(dtype, rows, depth, filters, workers):
    """Elements of scratch memory that `shared_panels` wants."""
    return packed_length(dtype, depth, filters) if _shares_panels(dtype, rows, depth, workers) else 0


@kernel
def shared_panels(dtype, rows, depth, filters, kernel, row_stride, column_stride, packed, workers):
    """The address `packed` with the kernel packed there, or 0 where each worker packs its own."""
    if not _shares_panels(dtype, rows, depth, workers):
        return 0
    pack(dtype, workers, depth, filters, kernel, row_stride, column_stride, packed)
    return packed


@kernel
def past_caches(dtype, rows, filters, y):
    """Whether y is better written past the caches: 1 where it would not stay in them, and vectors can be aligned."""
    row_bytes = filters * np.empty(0, dtype).itemsize
    aligned_rows = y % CACHE_LINE == 0 and row_bytes % CACHE_LINE == 0
    return 1 if aligned_rows and rows * row_bytes > STREAMED_BYTES else 0


@kernel
def multiply_block(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, kernel, row_stride, column_stride,
    panels, own, start, y, past_caches, low, high,
):  # fmt: skip
    """Filters f_first..f_last of y for a block of rows; y is the address of its first row.

    Assumes: a is readable up to a whole tile past its last row; `own` has room for a panel if `panels` is 0.
    """
    itemsize = np.empty(0, dtype).itemsize
    width = gemm_columns(dtype)
    for f in range(f_first, f_last, width):  # a panel of the kernel is brought into L2 once
        columns = min(width, filters - f)
        panel, next_step = panels + f * depth * itemsize, width
        next_panel = panel + width * depth * itemsize
        if panels == 0:
            source = kernel + f * column_stride * itemsize
            panel, next_panel, next_step = own, source + width * column_stride * itemsize, row_stride
            pack_panel(dtype, depth, columns, source, row_stride, column_stride, own)
        for m in range(0, rows, TILE_ROWS):  # tiles of rows pass it; each stays in L1 for its depth
            height = min(TILE_ROWS, rows - m)
            gemm_tile(
                dtype, tile_height(height), height, columns, depth,
                a + m * a_row * itemsize, a_row, 1, panel, width, next_panel, next_step,
                start + f * itemsize, 0, y + (m * filters + f) * itemsize, filters, past_caches, low, high,
            )  # fmt: skip
            next_panel, next_step = panel, 0  # once is enough
