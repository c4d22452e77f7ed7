"""The backward pass of a separable convolution, some lines of the image at a time: for large images and small kernels.

What a step makes of a band of lines is still in L2 when the next one reads it, and mid never leaves it. The lines are
cut into a fixed number of groups, each with sums of d_depthwise and d_pointwise of its own, so that the results do not
depend on the threads; hence the pointwise kernel must be small. Lines of d_x at a seam between two groups are made of
the d_mid of both, and come last.
"""

from __future__ import annotations

import numpy as np

from . import depthwise as dw
from . import pointwise as pw
from .blocking import tile_rows
from .depthwise_gradients import GRADIENT_GROUPS, correlate_lines, input_lines, lines_at_once, next_lines
from .gemm import past_caches, workspace_length
from .images import images_at_once, of_images
from .jit import kernel
from .memory import address, ceil_div, fence, keep, share, size_of, view
from .packing import pack, packed_length
from .pool import parallel_kernel
from .scratch import give, take_in_share, try_take
from .simd import infinity

BAND_BYTES = 384 << 10  # of x and d_mid; of L2 they leave room for a block of dy and its copies
LEAST_BAND = 48  # rows of mid: fewer would cost a pass over the sums of d_pointwise each
SUMS_BYTES = 4 << 20  # of d_pointwise at most, all groups together
LEAST_BYTES = 2 << 20  # a mid of less stays in the caches anyway
D_MID_BYTES = 4 << 20  # of some images at once, for their seams


@kernel
def wanted(dtype, g, filters):
    """Whether to work in bands: the sums are small, the bands are not, and mid would not stay in the caches."""
    itemsize = size_of(dtype)
    lines = lines_at_once(dtype, g, g.channels, BAND_BYTES)
    if lines > g.out_height:  # whole images
        lines -= lines % max(1, g.out_height)
    small = GRADIENT_GROUPS * g.channels * filters * itemsize <= SUMS_BYTES
    mid_bytes = g.batch * g.out_height * g.out_width * g.channels * itemsize
    return small and lines * g.out_width >= LEAST_BAND and mid_bytes > LEAST_BYTES


@kernel
def complete_lines(g, line):
    """Lines of d_x, counted over all images, that are made of output lines before `line` alone."""
    n, p = line // g.out_height, line % g.out_height
    return n * g.height + (min(max(p * g.stride_height - g.pad_top, 0), g.height) if p > 0 else 0)


@kernel
def first_own_line(g, line):
    """The first line of d_x that is made of output lines from `line` on alone."""
    n, p = line // g.out_height, line % g.out_height
    reach = (g.kernel_height - 1) * g.dilation_height - g.pad_top
    return n * g.height + (min(max((p - 1) * g.stride_height + reach + 1, 0), g.height) if p > 0 else 0)


@kernel
def block_rows(dtype, rows):
    """Rows of mid in a block, for a band of so many: whole tiles, the blocks about equal."""
    height = tile_rows(dtype)
    return ceil_div(ceil_div(rows, ceil_div(rows, most_rows(dtype))), height) * height


@kernel
def most_rows(dtype):
    """Rows of mid at most, from being computed to being multiplied: whole tiles."""
    return pw.GRADIENT_BLOCK_ROWS // tile_rows(dtype) * tile_rows(dtype)


@kernel
def _multiply_band(
    dtype, g, filters, first, last, end, x, depthwise, dy, panels, zeros, d_mid, d_pointwise, fresh, room
):  # fmt: skip
    """Pixels first..last of d_mid, and what they add to d_pointwise, or what it begins with if `fresh`.

    Meanwhile dy is asked for as far as pixel `end`, and of x what the next block reads first.
    """
    itemsize = size_of(dtype)
    depth, low, high = g.channels, -infinity(dtype), infinity(dtype)
    most = most_rows(dtype)
    rows_room = room + pw.gradient_length(dtype, depth) * itemsize
    workspace = rows_room + pw.rows_length(dtype, filters, most) * itemsize
    mid = workspace + workspace_length(dtype, filters, most) * itemsize
    step = block_rows(dtype, last - first)
    for m in range(first, last, step):
        m1, dy_block = min(last, m + step), dy + m * filters * itemsize
        if d_pointwise != 0:
            dw.forward_pixels(dtype, g, 0, depth, m, m1, x, low, depthwise, 0, mid, depth, 0, low, high)
            _, x_read = dw.input_range(g, m, m1)
            pw.add_gradient(
                dtype, m1 - m, depth, filters, mid, depth, dy_block, filters, d_pointwise, fresh and m == first,
                x + x_read * itemsize, depth, room,
            )  # fmt: skip
        if d_mid != 0:
            pw.multiply_rows(
                dtype, m, m1, min(end, m1 + step), filters, depth, 0, depth, dy, 0, 1, filters,
                False, panels, rows_room, workspace, zeros, 0, d_mid, 0, low, high,
            )  # fmt: skip


@kernel
def _room_length(dtype, depth, filters):
    """Elements of scratch memory that `_multiply_band` wants."""
    most = most_rows(dtype)
    rows = pw.rows_length(dtype, filters, most) + workspace_length(dtype, filters, most)
    return pw.gradient_length(dtype, depth) + rows + most * depth


@parallel_kernel
def _add_lines(
    dtype, worker, workers, g, filters, x, depthwise, dy, panels, zeros, d_mid, d_x, streamed, d_depthwise, d_pointwise,
    fresh, lacking,
):  # fmt: skip
    """A worker's groups of output lines: their d_mid, their d_x but for the seams, and what they add to their sums.

    Parallel over: a fixed number of groups of output lines.
    """
    itemsize = size_of(dtype)
    room = take_in_share(dtype, _room_length(dtype, g.channels, filters), lacking)
    if room == 0:
        return
    taps, size = g.kernel_height * g.kernel_width * g.channels, g.channels * filters
    at_once = lines_at_once(dtype, g, g.channels, BAND_BYTES)
    first_group, last_group = share(GRADIENT_GROUPS, worker, workers)
    for group in range(first_group, last_group):
        depthwise_sums = d_depthwise + group * taps * itemsize if d_depthwise != 0 else 0
        pointwise_sums = d_pointwise + group * size * itemsize if d_pointwise != 0 else 0
        if fresh and d_depthwise != 0:
            view(dtype, depthwise_sums, taps)[:] = 0
        line, last = share(g.batch * g.out_height, group, GRADIENT_GROUPS)
        done = max(complete_lines(g, line), first_own_line(g, line))
        begins = fresh != 0
        if begins and line == last and d_pointwise != 0:  # a group without lines
            view(dtype, pointwise_sums, size)[:] = 0
        while line < last:
            images, count = next_lines(g, line, last, at_once)
            first, end = line * g.out_width, last * g.out_width
            _multiply_band(
                dtype, g, filters, first, first + count * g.out_width, end, x, depthwise, dy, panels, zeros,
                d_mid, pointwise_sums, begins, room,
            )  # fmt: skip
            if d_depthwise != 0:
                correlate_lines(dtype, g, 0, g.channels, line, images, count, x, d_mid, depthwise_sums)
            line, begins = line + count, False
            if d_x != 0:
                input_lines(dtype, g, 0, g.channels, done, complete_lines(g, line), depthwise, d_mid, d_x, streamed)
            done = max(done, complete_lines(g, line))
    fence()
    give(room)


@parallel_kernel
def _fill_seams(dtype, worker, workers, g, depthwise, d_mid, d_x, streamed):
    """A worker's seams: the lines of d_x that `_add_lines` leaves out.

    Parallel over: groups of output lines.
    """
    first_group, last_group = share(GRADIENT_GROUPS, worker, workers)
    for group in range(first_group, last_group):
        line, last = share(g.batch * g.out_height, group, GRADIENT_GROUPS)
        own = min(first_own_line(g, line), complete_lines(g, last))
        input_lines(dtype, g, 0, g.channels, complete_lines(g, line), own, depthwise, d_mid, d_x, streamed)
    fence()


@kernel
def backward(dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, threads):
    """Fills what is wanted of d_x, d_depthwise, d_pointwise, some images at a time; says whether there was memory.

    Assumes: g.multiplier is 1; the batch is not empty.
    """
    itemsize = size_of(dtype)
    pixels, depth = g.out_height * g.out_width, g.channels
    wants_mid, images = d_x != 0 or d_depthwise != 0, images_at_once(dtype, g, D_MID_BYTES)
    taps, size = g.kernel_height * g.kernel_width * depth, depth * filters
    zeros, lacking = np.zeros(depth, dtype), np.zeros(1, np.intp)
    packed = packed_length(dtype, filters, depth) if wants_mid else 0
    mid_length = images * pixels * depth if wants_mid else 0
    panels = try_take(dtype, packed + mid_length + GRADIENT_GROUPS * (taps + size))
    if panels == 0:
        return False
    d_mid = panels + packed * itemsize
    depthwise_sums = d_mid + mid_length * itemsize
    pointwise_sums = depthwise_sums + GRADIENT_GROUPS * taps * itemsize
    if wants_mid:
        pack(dtype, threads, filters, depth, pointwise, 1, filters, panels)
    workers = GRADIENT_GROUPS if threads > 1 else 1
    streamed = past_caches(dtype, g.batch * g.height * g.width, depth, d_x)
    for n in range(0, g.batch, images):
        part = of_images(g, min(images, g.batch - n))
        x_at = n * g.height * g.width * depth * itemsize
        d_x_part = d_x + x_at if d_x != 0 else 0
        _add_lines(
            dtype, workers, part, filters, x + x_at, depthwise, dy + n * pixels * filters * itemsize, panels,
            address(zeros), d_mid if wants_mid else 0, d_x_part, streamed, depthwise_sums if d_depthwise != 0 else 0,
            pointwise_sums if d_pointwise != 0 else 0, 1 if n == 0 else 0, address(lacking),
        )  # fmt: skip
        if d_x != 0:
            _fill_seams(dtype, workers, part, depthwise, d_mid, d_x_part, streamed)
    if d_depthwise != 0:
        pw.add_groups(dtype, GRADIENT_GROUPS, taps, depthwise_sums, d_depthwise, False)
    if d_pointwise != 0:
        pw.add_groups(dtype, GRADIENT_GROUPS, size, pointwise_sums, d_pointwise, False)
    keep(zeros)
    give(panels)
    return lacking[0] == 0
