"""The matrix product in AMX's registers, for blocks that `gemm` cuts: see `amx_tile` for how they multiply.

A block of a is split into terms first, the kernel a panel at a time: the next one while the present one is multiplied,
so that it comes from memory once for each block, and from L2 then. A sum that is not finite may be so for one of its
terms alone: `gemm_tile` computes it anew.
"""

from __future__ import annotations

from numba import types

from .amx import OTHERS, ROWS, SIDE, STEP, STEP_BYTES, begin_tiles, end_tiles, terms
from .amx_packing import PARTS_A_STEP, TERMS, join_pairs, split_bytes, split_columns, split_panel, split_rows
from .amx_tile import PRODUCTS, amx_tile, finish_tile, is_finite, mend
from .gemm_tile import GEMM_ROWS, gemm_tile
from .jit import kernel
from .memory import ceil_div, size_of, view
from .packing import panel_length
from .pool import compiled_once
from .simd import CACHE_LINE, infinity

MOST_DEPTH = 1024  # of the products that a pass over y sums up: a block and two panels of so many fit L2
SUMS_BYTES = SIDE * SIDE * 4
_ROW_BYTES = SIDE * 4
_HEIGHT = next(rows for rows in GEMM_ROWS if SIDE % rows == 0)
_PRODUCTS = len(PRODUCTS[TERMS])


@kernel
def room_bytes(dtype, depth):
    """Scratch memory that `multiply_panel` wants: the sums of a tile, and what `_compute_anew` wants."""
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
            join_pairs(source, target, target + ROWS * _ROW_BYTES)


@compiled_once(but_for=OTHERS | {types.uint16})
def _compute_anew(dtype, depth, tile, panel, room):
    """The sums of a tile that are not finite, by fused multiply-adds of the float32 that the terms stand for.

    `room` holds the sums, the new ones, zeros to start from, and both sides.
    """
    whole = ceil_div(depth, STEP) * STEP
    mended = room + SUMS_BYTES
    zeros = mended + SUMS_BYTES
    rows = zeros + _ROW_BYTES
    columns = rows + SIDE * whole * 4
    view(dtype, zeros, SIDE)[:] = 0
    _join_rows(depth, tile, rows)
    _join_panel(depth, panel, columns)
    for m in range(0, SIDE, _HEIGHT):
        gemm_tile(
            dtype, _HEIGHT, _HEIGHT, SIDE, whole, rows + m * whole * 4, whole, 1, columns, SIDE, 0, columns, 0,
            zeros, 0, 0, mended + m * _ROW_BYTES, SIDE, 0, -infinity(dtype), infinity(dtype),
        )  # fmt: skip
    mend(room, mended)


@compiled_once(but_for=OTHERS)
def multiply_panel(
    dtype, rows, depth, columns, a, a_row, tail, panel, source, source_row, source_columns, next_panel,
    start, start_row, residual_offset, y, y_row, past_caches, low, high, room,
):  # fmt: skip
    """One panel of filters of y for the rows of a block, 32 at a time.

    a is a split block; of bfloat16 its rows, `a_row` apart, readable up to a multiple of 16, or the last of them are at
    `tail` as well. Meanwhile `next_panel` is packed from `source`, if that is not 0.
    Assumes: between `begin_tiles` and `end_tiles`.
    """
    itemsize, steps, tiles = size_of(dtype), ceil_div(depth, STEP), ceil_div(rows, SIDE)
    row, half, step = CACHE_LINE, ROWS * CACHE_LINE, TERMS * STEP_BYTES
    if terms(dtype) == 1:
        row, half, step = a_row * itemsize, ROWS * a_row * itemsize, CACHE_LINE
    products = _PRODUCTS if terms(dtype) > 1 else 1
    parts = ceil_div(PARTS_A_STEP, max(1, tiles) * products)
    for m in range(0, rows, SIDE):
        count, at = min(SIDE, rows - m), m * y_row * itemsize
        tile = a + m * row if terms(dtype) == 1 else a + split_bytes(m, depth)
        if count < SIDE and tail != 0:
            tile = tail
        amx_tile(
            dtype, ceil_div(count, ROWS), depth, tile, row, half, step, panel, room,
            source, source_row, source_columns, m // SIDE * steps * products * parts, parts, next_panel,
            y + at, y_row * itemsize, 0 if past_caches != 0 else count,
        )  # fmt: skip
        if terms(dtype) > 1 and not is_finite(count, room):
            _compute_anew(dtype, depth, tile, panel, room)
        finish_tile(
            dtype, count, columns, room, start + m * start_row * itemsize if start != 0 else 0, start_row,
            residual_offset, y + at, y_row, past_caches, low, high,
        )  # fmt: skip


@kernel
def depth_parts(dtype, depth):
    """Into how many parts the depth is cut: by it alone, since that decides on the order of a sum."""
    return max(1, ceil_div(depth, MOST_DEPTH)) if terms(dtype) > 1 else 1


@kernel
def _most_depth(dtype, depth):
    """The most of the depth that one of the parts has: whole steps."""
    return max(1, ceil_div(ceil_div(depth, STEP), depth_parts(dtype, depth))) * STEP


@kernel
def workspace_bytes(dtype, rows, depth):
    """Scratch memory that `multiply_in_tiles` wants for blocks of so many rows."""
    most = _most_depth(dtype, depth)
    panel = panel_length(dtype, most) * size_of(dtype)
    return room_bytes(dtype, most) + 2 * panel + (split_bytes(rows, most) if terms(dtype) > 1 else 0)


@kernel
def multiply_in_tiles(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, panels, start, residual_offset,
    y, past_caches, workspace, low, high,
):  # fmt: skip
    """Filters f_first..f_last of y for a block of rows, as `gemm.multiply_block` has it.

    Where the depth is cut, sums go on in y. Assumes: the kernel's columns lie side by side, if there are no panels.
    """
    itemsize, most = size_of(dtype), _most_depth(dtype, depth)
    whole, length = panel_length(dtype, depth) * itemsize, panel_length(dtype, most) * itemsize
    own = workspace + room_bytes(dtype, most)
    split, begin, begin_row = own + 2 * length, start, 0
    offset, streamed, least, greatest = 0, 0, -infinity(dtype), infinity(dtype)
    for k in range(0, max(1, depth), most):
        part = min(most, depth - k)
        if k + part >= depth:
            offset, streamed, least, greatest = residual_offset, past_caches, low, high
        if terms(dtype) > 1:
            split_block(rows, part, a + k * itemsize, a_row * itemsize, split)
            a_part, tail_part = split, 0
        else:
            a_part, tail_part = a, tail
        source = kernel + k * row_stride * itemsize if panels == 0 else 0
        multiply_part(
            dtype, rows, part, filters, f_first, f_last, a_part, a_row, tail_part, source, row_stride,
            panels + panel_length(dtype, k) * itemsize, whole, own, begin, begin_row, offset, y, filters,
            streamed, workspace, least, greatest,
        )  # fmt: skip
        begin, begin_row = y, filters


@kernel
def multiply_part(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, panels, length, own,
    start, start_row, residual_offset, y, y_row, past_caches, room, low, high,
):  # fmt: skip
    """The same for a part of the depth: of panels `length` bytes apart, or of a kernel, which is packed at `own`."""
    itemsize, own_length = size_of(dtype), panel_length(dtype, depth) * size_of(dtype)
    row_bytes, source = row_stride * itemsize, 0
    if kernel != 0:
        split_panel(dtype, depth, min(SIDE, filters - f_first), kernel + f_first * itemsize, row_bytes, own)
    begin_tiles(dtype)
    for f in range(f_first, f_last, SIDE):
        panel, next_panel, at = panels + f // SIDE * length, own, f * itemsize
        if kernel != 0:
            turn = (f - f_first) // SIDE % 2
            panel, next_panel = own + turn * own_length, own + (1 - turn) * own_length
            source = kernel + at + SIDE * itemsize if f + SIDE < f_last else 0
        multiply_panel(
            dtype, rows, depth, min(SIDE, filters - f), a, a_row, tail, panel,
            source, row_bytes, min(SIDE, filters - f - SIDE), next_panel,
            start + at if start != 0 else 0, start_row, residual_offset, y + at, y_row, past_caches, low, high, room,
        )  # fmt: skip
    end_tiles(dtype)


@kernel
def gradient_bytes(dtype, rows, depth):
    """Scratch memory that `add_tiles` wants: for blocks of up to so many rows of x and of dy."""
    return room_bytes(dtype, rows) + 2 * split_bytes(SIDE, rows) + split_bytes(depth, rows)


@kernel
def _tiles(dtype, most_rows, room):
    """Where in `room` x lies in tiles, behind two panels of dy."""
    return room + room_bytes(dtype, most_rows) + 2 * split_bytes(SIDE, most_rows)


@kernel
def pack_tiles(dtype, rows, most_rows, first, depth, x, x_row, room):
    """Columns first..first + depth of x, from address x on, for `add_tiles`. Assumes: `first` is a multiple of 32."""
    itemsize, tiles = size_of(dtype), _tiles(dtype, most_rows, room)
    for k in range(0, depth, SIDE):
        target = tiles + split_bytes(first + k, rows)
        split_columns(rows, min(SIDE, depth - k), x + k * itemsize, x_row * itemsize, target)


@kernel
def add_tiles(dtype, rows, most_rows, depth, filters, dy, dy_row, d_kernel, fresh, room):
    """d_kernel = x^T . dy for a block of rows, or += if not `fresh`, as `pointwise.add_strips` has it."""
    tiles, own = _tiles(dtype, most_rows, room), room + room_bytes(dtype, most_rows)
    multiply_part(
        dtype, depth, rows, filters, 0, filters, tiles, 0, 0, dy, dy_row, 0, 0, own,
        0 if fresh else d_kernel, dy_row, 0, d_kernel, dy_row, 0, room, -infinity(dtype), infinity(dtype),
    )  # fmt: skip
