"""Pointwise (1x1) convolution on the CPU: a matrix product, forward and backward.

    y[m,f]        = clamp(bias[f] + sum over k of x[m,k] * kernel[k,f])
    d_x[m,k]      = sum over f of dy[m,f] * kernel[k,f]
    d_kernel[k,f] = sum over m of x[m,k] * dy[m,f]
    d_bias[f]     = sum over m of dy[m,f]

x `[rows,depth]`, kernel `[depth,filters]`, dy and y `[rows,filters]`: addresses of C-contiguous float32 or float64
arrays. The blocking is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008),
with one level less: the whole depth is summed in registers.
"""

from __future__ import annotations

import numpy as np

from .gemm import (
    TILE_ROWS,
    block_tiles,
    multiply_block,
    padded_row,
    panel_length,
    past_caches,
    rows_collide,
    shared_length,
    shared_panels,
    tile_height,
    work,
)
from .jit import kernel
from .memory import address, ceil_div, copy, fence, keep, share, view
from .microkernel import correlate_tile, gemm_columns, gemm_tile
from .packing import pack_panel
from .pool import parallel_kernel
from .scratch import give, take

GRADIENT_BLOCK_ROWS = 256  # rows summed in registers before d_kernel is touched again
BIAS_GROUPS = 16  # partial sums of d_bias: a constant, so that the result does not depend on the thread count


@parallel_kernel
def _multiply(
    dtype, worker, workers, rows, depth, filters, x, kernel, row_stride, column_stride, panels, start, y, low, high
):
    """A worker's share of y, a block of rows of x at a time.

    Parallel over: tiles of rows; where these are few, panels of filters too.
    """
    itemsize = np.empty(0, dtype).itemsize
    first, last, f_first, f_last = work(dtype, rows, filters, worker, workers)
    step = block_tiles(dtype, depth, last - first)
    streamed = past_caches(dtype, rows, filters, y)
    copied = rows_collide(dtype, depth)
    row = padded_row(dtype, depth) if copied else depth
    block = take(dtype, (step if copied else 1) * TILE_ROWS * row + panel_length(dtype, depth))
    own = block + (step if copied else 1) * TILE_ROWS * row * itemsize
    for tile in range(first, last, step):
        m0, m1 = tile * TILE_ROWS, min(rows, min(last, tile + step) * TILE_ROWS)
        after = min(rows, min(last, tile + 2 * step) * TILE_ROWS)
        a, tail = x + m0 * depth * itemsize, 0
        if copied:
            for m in range(m0, m1):
                copy(block + (m - m0) * row * itemsize, x + m * depth * itemsize, depth * itemsize)
            a = block
        elif tile_height(m1 % TILE_ROWS) > m1 % TILE_ROWS:  # the last tile would read past the end of x
            tail = block
            left = m1 % TILE_ROWS
            copy(tail, x + (m1 - left) * depth * itemsize, left * depth * itemsize)
        multiply_block(
            dtype, m1 - m0, depth, filters, f_first, f_last, a, row, tail, kernel, row_stride, column_stride,
            panels, own, start, y + m0 * filters * itemsize, streamed,
            x + m1 * depth * itemsize, (after - m1) * depth, low, high,
        )  # fmt: skip
    fence()
    give(block)


@kernel
def multiply(dtype, rows, depth, filters, x, kernel, row_stride, column_stride, bias, y, low, high, threads):
    """y = clamp(x . kernel + bias), for a kernel of any strides. bias may be 0 (absent)."""
    packed = take(dtype, shared_length(dtype, rows, depth, filters, row_stride, column_stride, threads))
    zeros = np.zeros(filters, dtype)
    start = bias if bias != 0 else address(zeros)
    panels = shared_panels(dtype, rows, depth, filters, kernel, row_stride, column_stride, packed, threads)
    _multiply(dtype, threads, rows, depth, filters, x, kernel, row_stride, column_stride, panels, start, y, low, high)
    keep(zeros)
    give(packed)


@kernel
def forward(dtype, rows, depth, filters, x, kernel, bias, y, low, high, threads):
    """Fills y. bias may be 0 (absent)."""
    multiply(dtype, rows, depth, filters, x, kernel, filters, 1, bias, y, low, high, threads)


@kernel
def _gradient_tiles(dtype, rows, first, last, depth, columns, x, x_row, dy, panel, d_kernel, d_row, tail, fresh):
    """Adds x[:, k].dy for tiles first..last of k to one panel's columns of d_kernel, over one block of rows.

    The first tile packs dy into the panel; a panel of less than its full width is packed beforehand.
    """
    itemsize = np.empty(0, dtype).itemsize
    width = gemm_columns(dtype)
    next_x = x + rows * x_row * itemsize  # the block after this one, asked for early
    zeros = panel + rows * width * itemsize  # the panel ends in a row of zeros, from which a fresh sum starts
    b, b_row, packed = dy, d_row, panel
    if columns < width:
        pack_panel(dtype, rows, columns, dy, d_row, 1, panel)
        b, b_row, packed = panel, width, 0
    for tile in range(first, last):
        k = tile * TILE_ROWS
        count = min(TILE_ROWS, depth - k)
        height = tile_height(count)
        a, a_step = x + k * itemsize, x_row
        if height > count:  # the tile would read past the end of x: it reads a copy
            values, copy = view(dtype, a, (rows - 1) * x_row + count), view(dtype, tail, rows * TILE_ROWS)
            for m in range(rows):
                for i in range(height):
                    copy[m * TILE_ROWS + i] = values[m * x_row + i] if i < count else 0
            a, a_step = tail, TILE_ROWS
        target = d_kernel + k * d_row * itemsize
        start, start_row = (zeros, 0) if fresh else (target, d_row)
        gemm_tile(
            dtype, height, count, columns, rows, a, 1, a_step, b, b_row, packed, next_x + k * itemsize, x_row,
            start, start_row, target, d_row, 0, dtype(-np.inf), dtype(np.inf),
        )  # fmt: skip
        b, b_row, packed = panel, width, 0


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


@parallel_kernel
def _kernel_gradient(dtype, worker, workers, rows, depth, filters, x, x_row, dy, d_kernel, accumulate):
    """A worker's rectangle of d_kernel, summed over all rows in blocks: the order never depends on the workers.

    Parallel over: rectangles of d_kernel, so nothing is reduced.
    """
    itemsize = np.empty(0, dtype).itemsize
    width = gemm_columns(dtype)
    panels, tiles = ceil_div(filters, width), ceil_div(depth, TILE_ROWS)
    panel_parts, tile_parts = gradient_split(panels, tiles, workers)
    panel_first, panel_last = share(panels, worker // tile_parts, panel_parts)
    tile_first, tile_last = share(tiles, worker % tile_parts, tile_parts)
    packed = take(dtype, GRADIENT_BLOCK_ROWS * (width + TILE_ROWS) + width)
    tail = packed + (GRADIENT_BLOCK_ROWS + 1) * width * itemsize
    for m in range(0, rows, GRADIENT_BLOCK_ROWS):  # this block of x stays in L2
        count = min(GRADIENT_BLOCK_ROWS, rows - m)
        for panel in range(panel_first, panel_last):  # this panel of dy stays in L1
            f = panel * width
            columns = min(width, filters - f)
            view(dtype, packed + count * width * itemsize, width)[:] = 0
            _gradient_tiles(
                dtype, count, tile_first, tile_last, depth, columns, x + m * x_row * itemsize, x_row,
                dy + (m * filters + f) * itemsize, packed, d_kernel + f * itemsize, filters, tail, m == 0 and not accumulate,
            )  # fmt: skip
    give(packed)


@kernel
def kernel_gradient(dtype, rows, depth, filters, x, x_row, dy, d_kernel, accumulate, threads):
    """d_kernel = x^T . dy, or += with `accumulate`."""
    if rows == 0 and not accumulate:
        view(dtype, d_kernel, depth * filters)[:] = 0
    _kernel_gradient(dtype, threads, rows, depth, filters, x, x_row, dy, d_kernel, accumulate)


@parallel_kernel
def _column_sums(dtype, worker, workers, rows, columns, x, ones, sums):
    """A worker's groups of rows, each summed into its own line of `sums`.

    Parallel over: a fixed number of groups of rows.
    """
    itemsize = np.empty(0, dtype).itemsize
    first, last = share(BIAS_GROUPS, worker, workers)
    for group in range(first, last):
        m0, m1 = share(rows, group, BIAS_GROUPS)
        correlate_tile(
            dtype, columns, 1, 1, m1 - m0, ones, 0, 0, 0,
            x + m0 * columns * itemsize, 0, 0, columns, sums + group * columns * itemsize,
        )  # fmt: skip


@kernel
def add_groups(dtype, sums, total, accumulate):
    """total[j] = sum over groups of sums[group,j], in their order; or += with `accumulate`."""
    groups, size = sums.shape
    result = view(dtype, total, size)
    if not accumulate:
        result[:] = 0
    for group in range(groups):
        for j in range(size):
            result[j] += sums[group, j]


@kernel
def column_sums(dtype, rows, columns, x, total, threads):
    """total[j] = sum over m of x[m,j]."""
    ones = np.ones(columns, dtype)
    sums = np.zeros((BIAS_GROUPS, columns), dtype)
    _column_sums(dtype, threads, rows, columns, x, address(ones), address(sums))
    add_groups(dtype, sums, total, False)
    keep(ones)


@kernel
def backward(dtype, rows, depth, filters, x, kernel, dy, d_x, d_kernel, d_bias, threads):
    """Fills d_x, d_kernel and d_bias, each where its address is not 0."""
    if d_x != 0:
        low, high = dtype(-np.inf), dtype(np.inf)
        multiply(dtype, rows, filters, depth, dy, kernel, 1, filters, 0, d_x, low, high, threads)
    if d_kernel != 0:
        kernel_gradient(dtype, rows, depth, filters, x, depth, dy, d_kernel, False, threads)
    if d_bias != 0:
        column_sums(dtype, rows, filters, dy, d_bias, threads)
