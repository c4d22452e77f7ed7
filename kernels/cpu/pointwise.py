"""Pointwise (1x1) convolution on the CPU: a matrix product, forward and backward.

    y[m,f]        = clamp(bias[f] + sum over k of x[m,k] * kernel[k,f] + residual[m,f])
    d_x[m,k]      = sum over f of dy[m,f] * kernel[k,f]
    d_kernel[k,f] = sum over m of x[m,k] * dy[m,f]
    d_bias[f]     = sum over m of dy[m,f]

x `[rows,depth]`, kernel `[depth,filters]`, dy, y, residual `[rows,filters]`: addresses of C-contiguous float32 or
float64 arrays, forward also bfloat16 ones, which are summed in float32. The blocking is that of Goto and van de Geijn
(Anatomy of High-Performance Matrix Multiplication, 2008), with one level less: see `gemm`.
"""

from __future__ import annotations

import numpy as np

from . import amx_gemm
from .amx import MATRICES, MULTIPLIED, ROWS, terms
from .blocking import (
    TILE_ROWS,
    block_count,
    block_range,
    block_rows,
    padded_row,
    rows_collide,
    shares,
    tile_height,
    tile_rows,
    work,
)
from .correlation_tiles import correlate_tile
from .gemm import (
    clear_behind,
    column_of_lines,
    is_thin,
    lines_of_row,
    multiply_block,
    past_caches,
    shared_length,
    shared_panels,
    workspace_length,
)
from .gemm_tile import ASK_STEP, gemm_columns, gemm_tile
from .jit import entry, kernel
from .memory import address, ceil_div, copy, fence, keep, share, size_of, view
from .packing import pack_panel, pack_strip, strip_width, whole_depth
from .pool import compiled_once, parallel_kernel
from .scratch import give, require, take_in_share, try_take
from .simd import CACHE_LINE, infinity
from .tiles import CHOSEN

GRADIENT_PANEL_BYTES = 24 * 1024  # L1 holds a panel of dy and a strip of x
GRADIENT_BLOCK_ROWS = GRADIENT_PANEL_BYTES // (CHOSEN.vectors * CHOSEN.vector_bytes)  # before d_kernel is touched
MOST_BLOCK_ROWS = GRADIENT_BLOCK_ROWS * 3 // 2  # a few rows more cost less than to read and write d_kernel once more
BIAS_GROUPS = 16  # partial sums of d_bias: a constant, so that the result does not depend on the thread count


@kernel
def rows_length(dtype, depth, rows):
    """Elements of scratch memory that `multiply_rows` wants for so many rows, whole tiles, at once."""
    if terms(dtype) > 1:  # they are split, not copied
        return 0
    return (rows if _copied(dtype, depth) else tile_rows(dtype)) * padded_row(dtype, depth)


@kernel
def _copied(dtype, depth):
    """Whether rows of x are copied: where they collide, or end amid a product; not where they are split anyway."""
    return terms(dtype) <= 1 and (rows_collide(dtype, depth) or depth != whole_depth(dtype, depth))


@kernel
def _reads_further(dtype, rows):
    """Whether the tile for so many rows reads more, which may not be there."""
    if terms(dtype) > 0:
        return terms(dtype) == 1 and rows % ROWS != 0
    return tile_height(rows) > rows


@kernel
def multiply_rows(
    dtype, m0, m1, after, depth, filters, f_first, f_last, x, kernel, row_stride, column_stride,
    thin, panels, room, own, start, residual_offset, y, streamed, low, high,
):  # fmt: skip
    """Rows m0..m1 of y, filters f_first..f_last; meanwhile the rows m1..after of x are asked for.

    The kernel lies in packed `panels`, or `own` has room for two. `room` is for the rows that are copied: all, or the
    last tile's only, where the tile that is taken has more rows and would read past the end of x.
    """
    itemsize = size_of(dtype)
    a, row, tail, left = x + m0 * depth * itemsize, depth, 0, (m1 - m0) % tile_rows(dtype)
    if _copied(dtype, depth):
        row = padded_row(dtype, depth)
        for m in range(m0, m1):
            copy(room + (m - m0) * row * itemsize, x + m * depth * itemsize, depth * itemsize)
        clear_behind(dtype, m1 - m0, depth, room, row)
        a = room
    elif _reads_further(dtype, left):
        tail = room
        copy(tail, x + (m1 - left) * depth * itemsize, left * depth * itemsize)
    multiply_block(
        dtype, m1 - m0, depth, filters, f_first, f_last, a, row, tail, kernel, row_stride, column_stride,
        thin, panels, own, start, residual_offset, y + m0 * filters * itemsize, streamed,
        x + m1 * depth * itemsize, (after - m1) * depth, low, high,
    )  # fmt: skip


@parallel_kernel
def _multiply(
    dtype, worker, workers, rows, depth, filters, x, kernel, row_stride, column_stride, panels, start,
    residual_offset, y, low, high, lacking,
):  # fmt: skip
    """A worker's share of y, a block of rows of x at a time.

    Parallel over: rows; where these are few, panels of filters too.
    """
    itemsize = size_of(dtype)
    first, last, f_first, f_last = work(dtype, rows, filters, worker, workers)
    blocks = block_count(dtype, depth, last - first)
    streamed, thin = past_caches(dtype, rows, filters, y), is_thin(dtype, rows, column_stride)
    most_rows = block_rows(dtype, last - first, blocks)
    room = rows_length(dtype, depth, most_rows)
    block = take_in_share(dtype, room + workspace_length(dtype, depth, most_rows), lacking)
    if block == 0:
        return
    own = block + room * itemsize
    for number in range(blocks):
        m0, m1 = block_range(dtype, first, last, blocks, number)
        _, after = block_range(dtype, first, last, blocks, number + 1)
        multiply_rows(
            dtype, m0, m1, after, depth, filters, f_first, f_last, x, kernel, row_stride, column_stride,
            thin, panels, block, own, start, residual_offset, y, streamed, low, high,
        )  # fmt: skip
    fence()
    give(block)


@kernel
def multiply(
    dtype, rows, depth, filters, x, kernel, row_stride, column_stride, kept, bias, residual, y, low, high, threads
):
    """y = clamp(x . kernel + bias + residual), a kernel of any strides; says whether there was memory.

    bias and residual may be 0 (absent); `kept` is the kernel as `gemm.pack` packs it, or 0.
    """
    zeros, lacking = np.zeros(filters, dtype), np.zeros(1, np.intp)
    start = bias if bias != 0 else address(zeros)
    packed = try_take(dtype, shared_length(dtype, rows, depth, filters, row_stride, column_stride, kept, threads))
    if packed == 0:
        return False
    panels = shared_panels(dtype, rows, depth, filters, kernel, row_stride, column_stride, kept, packed, threads)
    parts = shares(rows, threads, panels != 0)
    _multiply(
        dtype, parts, rows, depth, filters, x, kernel, row_stride, column_stride, panels, start,
        residual - y if residual != 0 else 0, y, low, high, address(lacking),
    )  # fmt: skip
    keep(zeros)
    give(packed)
    return lacking[0] == 0


@entry
def forward(dtype, rows, depth, filters, x, kernel, bias, y, low, high, threads):
    """Fills y. bias may be 0 (absent)."""
    require(multiply(dtype, rows, depth, filters, x, kernel, filters, 1, 0, bias, 0, y, low, high, threads))


@compiled_once(but_for=MULTIPLIED)
def _gradient_panel(
    dtype, rows, tiles, depth, columns, strips, dy, dy_row, panel, d_kernel, fresh, next_dy, next_lines,
    ahead, ahead_step, ahead_lines,
):  # fmt: skip
    """Adds x^T.dy over one block of rows to one panel's columns of d_kernel, as many rows of it as there are strips.

    The first tile packs dy into the panel, which ends in a row of zeros: from there a fresh sum starts. Each of the
    others asks for another column of lines, first of the next panel of dy, then of what lies ahead: all at once would
    wait for each other. Where they are too few for the panel, the first asks for all of it.
    """
    itemsize = size_of(dtype)
    width, strip = gemm_columns(dtype), strip_width(dtype)
    zeros = panel + rows * width * itemsize
    b, b_row, packed, silent = dy, dy_row, panel, 1
    if columns < width:
        pack_panel(dtype, rows, columns, dy, dy_row, 1, panel)
        b, b_row, packed, silent = panel, width, 0, 0
    few = packed != 0 and tiles <= next_lines * ASK_STEP
    asks = 0 if few else next_lines * ASK_STEP
    for tile in range(tiles):
        k, turn = tile * TILE_ROWS, tile - silent
        count = min(TILE_ROWS, depth - k)
        target = d_kernel + k * dy_row * itemsize
        start, start_row = (zeros, 0) if fresh else (target, dy_row)
        wanted, step = panel, 0  # nothing that is not there
        if packed != 0:
            if few:
                wanted, step = next_dy, dy_row
        elif turn < asks:
            wanted, step = column_of_lines(dtype, next_dy, dy_row, turn)
        elif turn - asks < ahead_lines * ASK_STEP:
            wanted, step = column_of_lines(dtype, ahead, ahead_step, turn - asks)
        gemm_tile(
            dtype, tile_height(count), count, columns, rows, strips + tile * rows * strip * itemsize, 1, strip,
            b, b_row, packed, wanted, step, start, start_row, 0, target, dy_row, 0, -infinity(dtype), infinity(dtype),
        )  # fmt: skip
        b, b_row, packed = panel, width, 0


@kernel
def gradient_blocks(rows):
    """Into how many blocks the rows are cut, which are about equal and have at most MOST_BLOCK_ROWS rows."""
    if rows <= MOST_BLOCK_ROWS:
        return min(1, rows)
    return (rows + GRADIENT_BLOCK_ROWS // 2) // GRADIENT_BLOCK_ROWS


@kernel
def gradient_length(dtype, depth):
    """Elements of scratch memory that `add_gradient` and `add_strips` want: a panel of dy, then strips of x."""
    if terms(dtype) > 1:
        return amx_gemm.gradient_bytes(dtype, MOST_BLOCK_ROWS, depth) // size_of(dtype)
    strips = ceil_div(depth, TILE_ROWS) * strip_width(dtype)
    return (MOST_BLOCK_ROWS + 1) * gemm_columns(dtype) + MOST_BLOCK_ROWS * strips


@kernel
def _strips(dtype, room):
    """Where in `room` the strips begin, which stay in L2: behind a panel of dy and its row of zeros."""
    return room + (MOST_BLOCK_ROWS + 1) * gemm_columns(dtype) * size_of(dtype)


@kernel
def pack_strips(dtype, rows, first, depth, x, x_row, room):
    """Columns first..first + depth of x, from address x on, for `add_strips`. Assumes: `first` begins a strip."""
    itemsize = size_of(dtype)
    if MATRICES and terms(dtype) > 1:
        amx_gemm.pack_tiles(dtype, rows, MOST_BLOCK_ROWS, first, depth, x, x_row, room)
        return
    strips = _strips(dtype, room)
    for k in range(0, depth, TILE_ROWS):
        strip = strips + (first + k) // TILE_ROWS * rows * strip_width(dtype) * itemsize
        pack_strip(dtype, rows, min(TILE_ROWS, depth - k), x + k * itemsize, x_row, strip)


@kernel
def add_strips(dtype, rows, depth, filters, dy, dy_row, d_kernel, fresh, ahead, ahead_step, room):
    """d_kernel = x^T . dy for a block of rows, or += if not `fresh`: so many columns of x, and of dy and d_kernel.

    Meanwhile asks for as many columns of the rows `ahead`, if that is not 0, and for the next panel of dy: after the
    last, that of the rows behind.
    Assumes: x is packed in `room`; rows <= MOST_BLOCK_ROWS; rows of dy and of d_kernel `dy_row` apart.
    """
    if MATRICES and terms(dtype) > 1:
        amx_gemm.add_tiles(dtype, rows, MOST_BLOCK_ROWS, depth, filters, dy, dy_row, d_kernel, fresh, room)
        return
    itemsize, width = size_of(dtype), gemm_columns(dtype)
    view(dtype, room + rows * width * itemsize, width)[:] = 0
    panels, next_lines = ceil_div(filters, width), lines_of_row(dtype, dy, dy_row, min(width, filters))
    ahead_lines = lines_of_row(dtype, ahead, ahead_step, depth) if ahead != 0 else 0
    for number in range(panels):  # a panel of dy stays in L1
        f = number * width
        next_dy = dy + (f + width if number < panels - 1 else rows * dy_row) * itemsize
        first, last = share(ahead_lines, number, panels)
        _gradient_panel(
            dtype, rows, ceil_div(depth, TILE_ROWS), depth, min(width, filters - f), _strips(dtype, room),
            dy + f * itemsize, dy_row, room, d_kernel + f * itemsize, fresh, next_dy, next_lines,
            ahead + first * CACHE_LINE, ahead_step, last - first,
        )  # fmt: skip


@kernel
def add_gradient(dtype, rows, depth, filters, x, x_row, dy, dy_row, d_kernel, fresh, ahead, ahead_step, room):
    """As `add_strips`, for an x that is not packed."""
    pack_strips(dtype, rows, 0, depth, x, x_row, room)
    add_strips(dtype, rows, depth, filters, dy, dy_row, d_kernel, fresh, ahead, ahead_step, room)


@kernel
def gradient_split(panels, tiles, threads):
    """(parts of the panels, parts of the tiles) that leave the least work to the busiest of `threads` threads."""
    best, best_panels, best_tiles = panels * tiles + 1, 1, threads
    for parts in range(1, threads + 1):
        if threads % parts == 0:
            most = ceil_div(panels, parts) * ceil_div(tiles, threads // parts)
            if most < best:
                best, best_panels, best_tiles = most, parts, threads // parts
    return best_panels, best_tiles


@kernel
def gradient_work(dtype, depth, filters, worker, workers):
    """A worker's rectangle of d_kernel: (first row, past the last, first column, past the last)."""
    width, height = gemm_columns(dtype), tile_rows(dtype)
    panels, tiles = ceil_div(filters, width), ceil_div(depth, height)
    panel_parts, tile_parts = gradient_split(panels, tiles, workers)
    panel_first, panel_last = share(panels, worker // tile_parts, panel_parts)
    tile_first, tile_last = share(tiles, worker % tile_parts, tile_parts)
    return (
        tile_first * height, min(depth, tile_last * height), panel_first * width, min(filters, panel_last * width)
    )  # fmt: skip


@parallel_kernel
def _kernel_gradient(dtype, worker, workers, rows, depth, filters, x, dy, d_kernel, lacking):
    """A worker's rectangle of d_kernel, summed over all rows in blocks: the order never depends on the workers.

    Parallel over: rectangles of d_kernel, so nothing is reduced.
    """
    itemsize = size_of(dtype)
    k_first, k_last, f_first, f_last = gradient_work(dtype, depth, filters, worker, workers)
    room = take_in_share(dtype, gradient_length(dtype, k_last - k_first), lacking)
    if room == 0:
        return
    blocks = gradient_blocks(rows)
    for block in range(blocks):
        m0, m1 = share(rows, block, blocks)
        add_gradient(
            dtype, m1 - m0, k_last - k_first, f_last - f_first, x + (m0 * depth + k_first) * itemsize, depth,
            dy + (m0 * filters + f_first) * itemsize, filters, d_kernel + (k_first * filters + f_first) * itemsize,
            block == 0, x + (m1 * depth + k_first) * itemsize, depth, room,
        )  # fmt: skip
    give(room)


@kernel
def kernel_gradient(dtype, rows, depth, filters, x, dy, d_kernel, threads):
    """d_kernel = x^T . dy; says whether there was memory."""
    if rows == 0:
        view(dtype, d_kernel, depth * filters)[:] = 0
    lacking = np.zeros(1, np.intp)
    _kernel_gradient(dtype, threads, rows, depth, filters, x, dy, d_kernel, address(lacking))
    return lacking[0] == 0


@parallel_kernel
def _column_sums(dtype, worker, workers, rows, columns, x, ones, sums):
    """A worker's groups of rows, each summed into its own line of `sums`.

    Parallel over: a fixed number of groups of rows.
    """
    itemsize = size_of(dtype)
    first, last = share(BIAS_GROUPS, worker, workers)
    for group in range(first, last):
        m0, m1 = share(rows, group, BIAS_GROUPS)
        out = sums + group * columns * itemsize
        view(dtype, out, columns)[:] = 0
        correlate_tile(dtype, columns, 1, 1, m1 - m0, ones, 0, 0, 0, x + m0 * columns * itemsize, 0, 0, columns, out)


@kernel
def add_groups(dtype, groups, size, sums, total, accumulate):
    """total[j] = sum over groups of sums[group*size + j], in their order; or += with `accumulate`."""
    result = view(dtype, total, size)
    if not accumulate:
        result[:] = 0
    for group in range(groups):
        part = view(dtype, sums + group * size * result.itemsize, size)
        for j in range(size):
            result[j] += part[j]


@kernel
def column_sums(dtype, rows, columns, x, total, threads):
    """total[j] = sum over m of x[m,j]; says whether there was memory."""
    ones = np.ones(columns, dtype)
    sums = try_take(dtype, BIAS_GROUPS * columns)
    if sums == 0:
        return False
    _column_sums(dtype, BIAS_GROUPS if threads > 1 else 1, rows, columns, x, address(ones), sums)
    add_groups(dtype, BIAS_GROUPS, columns, sums, total, False)
    give(sums)
    keep(ones)
    return True


@entry
def backward(dtype, rows, depth, filters, x, kernel, dy, d_x, d_kernel, d_bias, threads):
    """Fills d_x, d_kernel and d_bias, each where its address is not 0."""
    if d_x != 0:
        low, high = -infinity(dtype), infinity(dtype)
        require(multiply(dtype, rows, filters, depth, dy, kernel, 1, filters, 0, 0, 0, d_x, low, high, threads))
    if d_kernel != 0:
        require(kernel_gradient(dtype, rows, depth, filters, x, dy, d_kernel, threads))
    if d_bias != 0:
        require(column_sums(dtype, rows, filters, dy, d_bias, threads))
