"""The gradients of a depthwise convolution on the CPU: of its input and of its kernel, see `depthwise`.

Both read dy, so both are computed together, some lines of a few channels at a time: what one reads of dy is still in
the caches for the other. With d_kernel, how channels and lines are cut follows from the shape alone, and so does the
order in which it is summed.
"""

from __future__ import annotations

import math

from .correlation_tiles import CORRELATED_TAPS, correlate_rows, correlate_tile
from .depthwise_line import channel_block, inside, line_span
from .gemm import past_caches
from .jit import kernel
from .memory import ceil_div, fence, share, size_of, view
from .pointwise import add_groups
from .pool import compiled_once, parallel_kernel
from .scratch import give, try_take
from .simd import CACHE_LINE, infinity

GRADIENT_GROUPS = 16  # of lines at most, each with a d_kernel of its own, and parts of the work at least
GROUP_LINES = 4  # of output at least, or one of GROUP_PIXELS: a group costs a pass over all of d_kernel
GROUP_PIXELS = 256
PART_CHANNELS = 128  # at least: fewer would be read from too many places at once
FEW_CHANNELS = 64  # at least, while the shares are fewer than FEW_SHARES
FEW_SHARES = 8
GROUPS_A_THREAD = 2  # of lines of d_x alone
BAND_BYTES = 384 << 10  # of lines worked on together, which stay in L2
BAND_LINES = 4  # at least, where parts of the channels can make that possible: each is read for three of d_x
CORRELATED_CHANNELS = 256  # what so many channels of a line are read for, tap by tap, finds them in L1


@kernel
def _taps_reaching(position, stride, dilation, taps):
    """The taps j, output indices i with `i*stride + j*dilation == position`, which step evenly:
    (first tap, tap step, taps, first output index, output index step). The indices may lie outside the output.
    """
    common = math.gcd(stride, dilation)
    tap_step = stride // common
    for tap in range(min(tap_step, taps)):
        if (position - tap * dilation) % stride == 0:
            return (
                tap,
                tap_step,
                ceil_div(taps - tap, tap_step),
                (position - tap * dilation) // stride,
                -dilation // common,
            )
    return 0, tap_step, 0, 0, -dilation // common


@kernel
def _input_line(dtype, g, c, count, n, h, kernel, dy, d_x, streamed):
    """Channels c .. c + count of line h of image n of d_x: one pass a column phase of the stride, no tap wasted."""
    itemsize = size_of(dtype)
    low, high = -infinity(dtype), infinity(dtype)
    line = g.out_width * g.channels
    r, r_step, r_count, p, p_step = _taps_reaching(h + g.pad_top, g.stride_height, g.dilation_height, g.kernel_height)
    row_first, row_last = inside(p, p_step, r_count, g.out_height)
    # rows from the last to the first, as their lines of dy ascend: tiles ask for more of the last line, the others are
    # where the line of d_x before left them
    r, p = r + (row_last - 1) * r_step, p + (row_last - 1) * p_step
    for phase in range(min(g.stride_width, g.width)):
        s, s_step, s_count, q, q_step = _taps_reaching(
            phase + g.pad_left, g.stride_width, g.dilation_width, g.kernel_width
        )
        rows = row_last - row_first if s_count > 0 else 0
        line_span(
            dtype, count, 0, ceil_div(g.width - phase, g.stride_width),
            dy + ((n * g.out_height + p) * line + c) * itemsize, -p_step * line, low, rows,
            q, 1, q_step, s_count, g.out_width, g.channels,
            kernel + ((r * g.kernel_width + s) * g.channels + c) * itemsize, -r_step * g.kernel_width * g.channels,
            s_step * g.channels, 0,
            d_x + (((n * g.height + h) * g.width + phase) * g.channels + c) * itemsize, g.stride_width * g.channels,
            streamed, low, high,
        )  # fmt: skip


@kernel
def input_lines(dtype, g, c_first, c_last, first, last, kernel, dy, d_x, streamed):
    """Channels c_first..c_last of lines first..last of d_x, counted over all images.

    `streamed` is what `gemm.past_caches` says of d_x. Assumes: g.multiplier is 1.
    """
    step = channel_block(dtype, g.out_width * g.kernel_height)
    for c in range(c_first, c_last, step):
        for i in range(first, last):
            _input_line(dtype, g, c, min(step, c_last - c), i // g.height, i % g.height, kernel, dy, d_x, streamed)


@compiled_once
def _correlate_columns(
    dtype, g, c, count, kernel_rows, s, n_first, n_last, p_first, p_last, r, q_first, q_last, x, dy, out
):
    """Adds columns q_first..q_last of output lines p_first..p_last to tap (r, s) of d_kernel.

    With `kernel_rows` to CORRELATED_TAPS taps from s on of so many rows from r on, of which the first column may lack
    its first, the last its last.
    """
    if p_first >= p_last or q_first >= q_last:
        return
    itemsize = size_of(dtype)
    channels = g.channels
    row, column = p_first * g.stride_height + r * g.dilation_height - g.pad_top, q_first * g.stride_width
    column += s * g.dilation_width - g.pad_left
    x_at = x + (((n_first * g.height + row) * g.width + column) * channels + c) * itemsize
    dy_at = dy + (((n_first * g.out_height + p_first) * g.out_width + q_first) * channels + c) * itemsize
    out += ((r * g.kernel_width + s) * channels + c) * itemsize
    images, rows, columns = n_last - n_first, p_last - p_first, q_last - q_first
    line = g.width * channels
    x_image, x_row, x_pixel = g.height * line, g.stride_height * line, g.stride_width * channels
    dy_image, dy_row = g.out_height * g.out_width * channels, g.out_width * channels
    if kernel_rows > 0:
        last_column = column + (columns + 1) * g.stride_width
        correlate_rows(
            dtype, 1 if column < 0 else 0, 1 if last_column >= g.width else 0, kernel_rows, count,
            images, rows, columns, x_at, x_image, x_row, x_pixel, g.dilation_height * line,
            dy_at, dy_image, dy_row, channels, out, g.kernel_width * channels, channels,
        )  # fmt: skip
    else:
        correlate_tile(
            dtype, count, images, rows, columns, x_at, x_image, x_row, x_pixel, dy_at, dy_image, dy_row, channels, out
        )


@kernel
def _tap_columns(g, s):
    """The output columns [first, last) at which tap s of a row meets the image."""
    return inside(s * g.dilation_width - g.pad_left, g.stride_width, g.out_width, g.width)


@kernel
def _tap_lines(g, r, p_first, p_last):
    """Of the output lines p_first..p_last those at which row r of the kernel meets the image."""
    first, last = inside(r * g.dilation_height - g.pad_top, g.stride_height, p_last, g.height)
    return max(first, p_first), last


@kernel
def taps_together(taps, dilation, stride):
    """Of so many taps in a row, how many, from the first on, go CORRELATED_TAPS at a time."""
    return taps - taps % CORRELATED_TAPS if dilation == stride else 0


@kernel
def whole_lines(g, r, p_first, p_last):
    """Those at which CORRELATED_TAPS rows of the kernel from r on all meet the image; (p_last, p_last) for none."""
    if r + CORRELATED_TAPS > g.kernel_height:
        return p_last, p_last
    top_first, top_last = _tap_lines(g, r, p_first, p_last)
    end_first, end_last = _tap_lines(g, r + CORRELATED_TAPS - 1, p_first, p_last)
    first, last = max(top_first, end_first), min(top_last, end_last)
    return (first, last) if first < last else (p_last, p_last)


@kernel
def _correlate_sliding(dtype, g, c, count, s, n_first, n_last, p_first, p_last, q_first, q_last, x, dy, d_kernel):
    """Adds CORRELATED_TAPS taps of each row from s on, over columns at which the middle one is inside the image.

    As many rows of the kernel at once over the lines that meet all of those; then a row at a time over the rest.
    """
    for r in range(g.kernel_height):
        begin = r - r % CORRELATED_TAPS
        whole_first, whole_last = whole_lines(g, begin, p_first, p_last)
        if r == begin:
            _correlate_columns(
                dtype, g, c, count, CORRELATED_TAPS, s, n_first, n_last, whole_first, whole_last, r, q_first, q_last,
                x, dy, d_kernel,
            )  # fmt: skip
        p0, p1 = _tap_lines(g, r, p_first, p_last)
        for first, last in ((p0, min(p1, whole_first)), (max(p0, whole_last), p1)):
            _correlate_columns(
                dtype, g, c, count, 1, s, n_first, n_last, first, last, r, q_first, q_last, x, dy, d_kernel
            )


@kernel
def _correlate(dtype, g, c_first, c_last, n_first, n_last, p_first, p_last, x, dy, d_kernel):
    """Adds output lines p_first..p_last of images n_first..n_last to channels c_first..c_last of d_kernel.

    Where a row's taps slide, some of them at once over the columns whose middle tap is inside; then a tap at a time
    over the rest.
    """
    together = taps_together(g.kernel_width, g.dilation_width, g.stride_width)
    for c in range(c_first, c_last, CORRELATED_CHANNELS):
        count = min(CORRELATED_CHANNELS, c_last - c)
        slide_first, slide_last = 0, 0
        for s in range(g.kernel_width):
            if s >= together:
                slide_first, slide_last = 0, 0
            elif s % CORRELATED_TAPS == 0:
                slide_first, slide_last = _tap_columns(g, s + CORRELATED_TAPS // 2)
                _correlate_sliding(
                    dtype, g, c, count, s, n_first, n_last, p_first, p_last, slide_first, slide_last, x, dy, d_kernel
                )
            q0, q1 = _tap_columns(g, s)
            for r in range(g.kernel_height):
                p0, p1 = _tap_lines(g, r, p_first, p_last)
                for first, last in ((q0, min(q1, slide_first)), (max(q0, slide_last), q1)):
                    _correlate_columns(
                        dtype, g, c, count, 0, s, n_first, n_last, p0, p1, r, first, last, x, dy, d_kernel
                    )


@kernel
def _line_bytes(dtype, g, channels):
    """Of so many channels of an output line and of the lines of x that are new with it."""
    return (g.width * g.stride_height + g.out_width) * channels * size_of(dtype)


@kernel
def lines_at_once(dtype, g, channels, size):
    """Output lines of so many channels that fit into `size` bytes together with those of x that they are made of."""
    return max(1, size // max(1, _line_bytes(dtype, g, channels)))


@kernel
def next_lines(g, line, last, at_once):
    """What of the output lines line..last, counted over all images, is taken next: (whole images, lines).

    Whole images where they begin here and fit in; else 0 of them, and lines of one image, each time about equally many.
    """
    p = line % g.out_height
    images = min(last - line, at_once) // g.out_height if p == 0 else 0
    left = min(g.out_height - p, last - line)
    return images, images * g.out_height if images > 0 else ceil_div(left, ceil_div(left, at_once))


@kernel
def correlate_lines(dtype, g, c_first, c_last, line, images, count, x, dy, d_kernel):
    """Adds what `next_lines` says of the output lines from `line` on to channels c_first..c_last of d_kernel."""
    n, p = line // g.out_height, line % g.out_height
    if images > 0:
        _correlate(dtype, g, c_first, c_last, n, n + images, 0, g.out_height, x, dy, d_kernel)
    else:
        _correlate(dtype, g, c_first, c_last, n, n + 1, p, p + count, x, dy, d_kernel)


@kernel
def gradient_parts(dtype, g):
    """Into how many (groups of output lines, parts of the channels) the work is cut.

    Channels, where there are too few lines to share out, or too few would stay in L2 at once.
    """
    lines, line_bytes = g.batch * g.out_height, _line_bytes(dtype, g, g.channels)
    groups = max(1, min(GRADIENT_GROUPS, lines, max(lines // GROUP_LINES, lines * g.out_width // GROUP_PIXELS)))
    wanted = max(ceil_div(GRADIENT_GROUPS, groups), ceil_div(line_bytes * BAND_LINES, BAND_BYTES))
    parts = min(wanted, g.channels // PART_CHANNELS)
    return groups, max(1, parts, min(ceil_div(FEW_SHARES, groups), g.channels // FEW_CHANNELS))


@kernel
def _channels_of(dtype, g, part, parts):
    """The channels [first, last) of one of the parts: whole cache lines."""
    line = CACHE_LINE // size_of(dtype)
    first, last = share(ceil_div(g.channels, line), part, parts)
    return first * line, min(last * line, g.channels)


@kernel
def _group_gradients(dtype, g, c_first, c_last, group, groups, x, kernel, dy, d_x, sums):
    """Some channels of a group of lines: those of d_x, and what its lines of dy add to `sums`, each if it is not 0."""
    first, last = share(g.batch * g.out_height, group, groups)
    begin, end = share(g.batch * g.height, group, groups)
    at_once = lines_at_once(dtype, g, c_last - c_first, BAND_BYTES)
    line, done = first, begin
    streamed = past_caches(dtype, g.batch * g.height * g.width, g.channels, d_x)
    while line < last:
        images, count = next_lines(g, line, last, at_once)
        if sums != 0:
            correlate_lines(dtype, g, c_first, c_last, line, images, count, x, dy, sums)
        line += count
        until = begin + (end - begin) * (line - first) // (last - first)
        if d_x != 0:
            input_lines(dtype, g, c_first, c_last, done, until, kernel, dy, d_x, streamed)
        done = until
    if d_x != 0:
        input_lines(dtype, g, c_first, c_last, done, end, kernel, dy, d_x, streamed)
        fence()


@parallel_kernel
def _gradients(dtype, worker, workers, g, groups, parts, x, kernel, dy, d_x, sums, accumulate):
    """A worker's groups of lines and parts of channels: their d_x, and their sums for d_kernel.

    Parallel over: groups of lines, whose number the shape fixes where `sums` is not 0, and parts of the channels.
    """
    itemsize = size_of(dtype)
    taps = g.kernel_height * g.kernel_width
    first, last = share(groups * parts, worker, workers)
    for number in range(first, last):
        group, part = number // parts, number % parts
        c_first, c_last = _channels_of(dtype, g, part, parts)
        own = sums + group * taps * g.channels * itemsize if sums != 0 else 0
        if own != 0 and not accumulate:
            for tap in range(taps):
                view(dtype, own + (tap * g.channels + c_first) * itemsize, c_last - c_first)[:] = 0
        _group_gradients(dtype, g, c_first, c_last, group, groups, x, kernel, dy, d_x, own)


@kernel
def gradients(dtype, g, x, kernel, dy, d_x, d_kernel, accumulate, threads):
    """Fills d_x and d_kernel, each where it is not 0, or adds to d_kernel with `accumulate`; says whether there was
    memory. Assumes: g.multiplier is 1.
    """
    groups, parts = gradient_parts(dtype, g)
    if d_kernel == 0:  # then nothing is summed up in groups, and their number may follow the threads'
        groups, parts = max(1, min(g.batch * g.height, threads * GROUPS_A_THREAD)), 1
    workers = groups * parts if threads > 1 else 1
    if d_kernel == 0 or groups == 1:
        _gradients(dtype, workers, g, groups, parts, x, kernel, dy, d_x, d_kernel, accumulate)
        return True
    size = g.kernel_height * g.kernel_width * g.channels
    sums = try_take(dtype, groups * size)
    if sums == 0:
        return False
    _gradients(dtype, workers, g, groups, parts, x, kernel, dy, d_x, sums, False)
    add_groups(dtype, groups, size, sums, d_kernel, accumulate)
    give(sums)
    return True
