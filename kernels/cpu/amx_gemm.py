"""The matrix product in AMX's registers, for blocks that `gemm` cuts: see `amx_tile` for how they multiply.

A float32 result that is not finite may be so for one of its terms alone: it is computed anew by `gemm_tile`.
"""

from __future__ import annotations

from .amx_packing import TERMS, join_pairs, split_bytes, split_columns, split_panel, split_rows
from .amx_tile import SIDE, STEP, STEP_BYTES, amx_tile, begin_tiles, end_tiles, finish_tile, is_finite, mend, terms
from .gemm_tile import GEMM_ROWS, gemm_tile
from .jit import kernel
from .memory import ceil_div, size_of, view
from .packing import packed_length
from .pool import compiled_once
from .simd import CACHE_LINE, infinity

SUMS_BYTES = SIDE * SIDE * 4
_ROW_BYTES = SIDE * 4
HALF_ROWS = SIDE // 2


@kernel
def room_bytes(dtype, depth):
    """Scratch memory that `multiply_panel` wants: the sums of a tile; and where they may have to be computed anew, as
    many, zeros to start from, and both sides in float32."""
    whole = ceil_div(depth, STEP) * STEP
    return SUMS_BYTES + (SUMS_BYTES + _ROW_BYTES + 2 * SIDE * whole * 4 if terms(dtype) > 1 else 0)


@kernel
def split_block(rows, depth, a, a_bytes, split):
    """A block of float32 a, whose rows lie so many bytes apart, in tiles at `split`."""
    for m in range(0, rows, SIDE):
        split_rows(min(SIDE, rows - m), depth, a + m * a_bytes, a_bytes, split + split_bytes(m, depth))


@kernel
def _join_rows(depth, tile, joined):
    """The float32 of 32 rows of a tile."""
    steps = ceil_div(depth, STEP)
    for step in range(steps):
        for row in range(SIDE):
            target = joined + (row * steps + step) * STEP * 4
            source = tile + step * TERMS * STEP_BYTES + row * CACHE_LINE
            join_pairs(source, target, target + CACHE_LINE)


@kernel
def _join_panel(depth, panel, joined):
    """The float32 of a panel, row by row."""
    for step in range(ceil_div(depth, STEP)):
        for number in range(SIDE):
            source = panel + step * TERMS * STEP_BYTES + number * CACHE_LINE
            target = joined + step * STEP * _ROW_BYTES + number * CACHE_LINE
            join_pairs(source, target, target + HALF_ROWS * _ROW_BYTES)


@compiled_once
def _compute_anew(dtype, depth, tile, panel, room):
    """The sums of a tile that are not finite, by fused multiply-adds of the float32 that the terms stand for."""
    whole = ceil_div(depth, STEP) * STEP
    mended = room + SUMS_BYTES
    zeros = mended + SUMS_BYTES
    rows = zeros + _ROW_BYTES
    columns = rows + SIDE * whole * 4
    view(dtype, zeros, SIDE)[:] = 0
    _join_rows(depth, tile, rows)
    _join_panel(depth, panel, columns)
    for height in GEMM_ROWS[-1:]:
        for m in range(0, SIDE, height):
            gemm_tile(
                dtype, height, height, SIDE, whole, rows + m * whole * 4, whole, 1, columns, SIDE, 0, columns, 0,
                zeros, 0, 0, mended + m * _ROW_BYTES, SIDE, 0, -infinity(dtype), infinity(dtype),
            )  # fmt: skip
    mend(room, mended)


@compiled_once
def multiply_panel(
    dtype, rows, depth, columns, a, a_row, tail, panel, ahead, ahead_bytes, start, start_row, residual_offset,
    y, y_row, past_caches, low, high, room,
):  # fmt: skip
    """One panel of filters of y for the rows of a block, 32 at a time.

    a is a split block; of bfloat16 its rows, `a_row` apart, readable up to a multiple of 16, or the last of them are at
    `tail` as well. Meanwhile the bytes at `ahead` are asked for. Assumes: between `begin_tiles` and `end_tiles`.
    """
    itemsize, steps, tiles = size_of(dtype), ceil_div(depth, STEP), ceil_div(rows, SIDE)
    row, half, step = CACHE_LINE, HALF_ROWS * CACHE_LINE, TERMS * STEP_BYTES
    if terms(dtype) == 1:
        row, half, step = a_row * itemsize, HALF_ROWS * a_row * itemsize, CACHE_LINE
    lines = ceil_div(ahead_bytes, max(1, tiles * steps * CACHE_LINE))
    for m in range(0, rows, SIDE):
        count, at = min(SIDE, rows - m), m * y_row * itemsize
        tile = a + m * row if terms(dtype) == 1 else a + split_bytes(m, depth)
        if count < SIDE and tail != 0:
            tile = tail
        amx_tile(dtype, ceil_div(count, HALF_ROWS), steps, tile, row, half, step, panel, ahead, lines, room)
        ahead += lines * steps * CACHE_LINE
        if terms(dtype) > 1 and not is_finite(count, room):
            _compute_anew(dtype, depth, tile, panel, room)
        finish_tile(
            dtype, count, columns, room, start + m * start_row * itemsize, start_row, residual_offset, y + at, y_row,
            past_caches, low, high,
        )  # fmt: skip


@kernel
def workspace_bytes(dtype, rows, depth):
    """Scratch memory that `multiply_in_tiles` wants for blocks of so many rows."""
    return room_bytes(dtype, depth) + (split_bytes(rows, depth) if terms(dtype) > 1 else 0)


@kernel
def multiply_in_tiles(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, panels, start, residual_offset, y, past_caches,
    workspace, low, high,
):  # fmt: skip
    """Filters f_first..f_last of y for a block of rows, as `gemm.multiply_block` has it, of a kernel in `panels`."""
    itemsize = size_of(dtype)
    length = packed_length(dtype, depth, SIDE) * itemsize
    if terms(dtype) > 1:
        split = workspace + room_bytes(dtype, depth)
        split_block(rows, depth, a, a_row * itemsize, split)
        a, tail = split, 0
    begin_tiles(dtype)
    for f in range(f_first, f_last, SIDE):
        panel, at = panels + f // SIDE * length, f * itemsize
        multiply_panel(
            dtype, rows, depth, min(SIDE, filters - f), a, a_row, tail, panel, panel + length, length,
            start + at, 0, residual_offset, y + at, filters, past_caches, low, high, workspace,
        )  # fmt: skip
    end_tiles(dtype)


@kernel
def gradient_bytes(dtype, rows, depth):
    """Scratch memory that `add_tiles` wants: for blocks of up to so many rows of x and of dy."""
    return room_bytes(dtype, rows) + split_bytes(SIDE, rows) + split_bytes(depth, rows)


@kernel
def pack_tiles(dtype, rows, most_rows, first, depth, x, x_row, room):
    """Columns first..first + depth of x, from address x on, for `add_tiles`. Assumes: `first` is a multiple of 32."""
    strips = room + room_bytes(dtype, most_rows) + split_bytes(SIDE, most_rows)
    for k in range(0, depth, SIDE):
        split_columns(rows, min(SIDE, depth - k), x + k * 4, x_row * 4, strips + split_bytes(first + k, rows))


@kernel
def add_tiles(dtype, rows, most_rows, depth, filters, dy, dy_row, d_kernel, fresh, room):
    """d_kernel = x^T . dy for a block of rows, or += if not `fresh`, as `pointwise.add_strips` has it."""
    itemsize = size_of(dtype)
    zeros, panel = room + 2 * SUMS_BYTES, room + room_bytes(dtype, most_rows)
    strips = panel + split_bytes(SIDE, most_rows)
    view(dtype, zeros, SIDE)[:] = 0
    begin_tiles(dtype)
    for f in range(0, filters, SIDE):
        columns, target = min(SIDE, filters - f), d_kernel + f * itemsize
        split_panel(rows, columns, dy + f * itemsize, dy_row * itemsize, panel)
        start, start_row = (zeros, 0) if fresh else (target, dy_row)
        multiply_panel(
            dtype, depth, rows, columns, strips, 0, 0, panel, 0, 0, start, start_row, 0, target, dy_row, 0,
            -infinity(dtype), infinity(dtype), room,
        )  # fmt: skip
    end_tiles(dtype)
