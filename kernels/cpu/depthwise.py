"""Depthwise convolution on the CPU, forward and backward.

    y[n,p,q,c]      = clamp(bias[c] + sum over r, s of x[n, p*sh+r*dh-top, q*sw+s*dw-left, c] * kernel[r,s,c])
    d_x[n,h,w,c]    = sum over r, s of dy[n,p,q,c] * kernel[r,s,c], (p, q) the output pixel that reads (h, w) at (r, s)
    d_kernel[r,s,c] = sum over n, p, q of x[n, p*sh+r*dh-top, q*sw+s*dw-left, c] * dy[n,p,q,c]
    d_bias[c]       = sum over n, p, q of dy[n,p,q,c]

Addresses of C-contiguous channels-last float32 or float64 arrays, forward also bfloat16 ones, which are summed in
float32. A depth multiplier M > 1 is served by repeating
each input channel M times first. Taps that fall outside the image are skipped, not multiplied by zeros. Forward, what
of x is lower than `x_low` counts as that: a ReLU before the convolution costs nothing.
"""

from __future__ import annotations

import math

from .depthwise_line import inside, line_span, slides
from .depthwise_tiles import SLIDING_TAPS, correlate_rows, correlate_tile
from .jit import entry, kernel
from .memory import ceil_div, share, size_of, view
from .multiplier import repeat_channels, repeated_length, single, sum_repeated
from .pointwise import add_groups, column_sums
from .pool import compiled_once, parallel_kernel
from .scratch import give, require, take, try_take
from .simd import infinity, lanes
from .tiles import CHOSEN

GRADIENT_GROUPS = 16  # partial sums of d_kernel: a constant, so that the result does not depend on the thread count
LINES_BYTES = 32 * 1024  # what a few lines need of L1
ALL_CHANNELS = 1 << 40
BAND_BYTES = 192 * 1024  # lines worked on together stay in L2
CORRELATED_CHANNELS = 256  # what so many channels of a line are read for, tap by tap, finds them in L1


@kernel
def _forward_span(dtype, g, c, count, n, p, q_first, q_last, x, x_low, kernel, bias, y, y_pixel, low, high):
    """Channels c .. c + count of output pixels q_first..q_last of line p of image n, from address y on."""
    itemsize = size_of(dtype)
    line = g.width * g.channels
    top = p * g.stride_height - g.pad_top
    r_first, r_last = inside(top, g.dilation_height, g.kernel_height, g.height)
    kernel_row = g.kernel_width * g.channels
    x_line = (n * g.height + top + r_first * g.dilation_height) * line
    line_span(
        dtype, count, q_first, q_last, x + (x_line + c) * itemsize, g.dilation_height * line, x_low, r_last - r_first,
        -g.pad_left, g.stride_width, g.dilation_width, g.kernel_width, g.width, g.channels,
        kernel + (r_first * kernel_row + c) * itemsize, kernel_row, g.channels,
        bias + c * itemsize if bias != 0 else 0, y + c * itemsize, y_pixel, low, high,
    )  # fmt: skip


@kernel
def channel_block(dtype, pixels):
    """Channels taken at once: so many that `pixels` pixels, which consecutive lines read again, are still in L1.

    All, where not even the least would be: the hardware reads ahead of whole pixels.
    """
    least = CHOSEN.span * lanes(dtype)
    blocks = LINES_BYTES // max(1, pixels * least * size_of(dtype))
    return blocks * least if blocks > 0 else ALL_CHANNELS


@kernel
def input_range(g, first, last):
    """The part of x, (first element, past the last), in whole lines, that output pixels first..last are made of."""
    if first >= last:
        return 0, 0
    first_line, last_line = first // g.out_width, (last - 1) // g.out_width
    top = first_line % g.out_height * g.stride_height - g.pad_top
    bottom = last_line % g.out_height * g.stride_height - g.pad_top + (g.kernel_height - 1) * g.dilation_height
    begin = first_line // g.out_height * g.height + min(max(top, 0), g.height)
    end = last_line // g.out_height * g.height + min(max(bottom + 1, 0), g.height)
    return begin * g.width * g.channels, end * g.width * g.channels


@kernel
def forward_pixels(dtype, g, c_first, c_last, first, last, x, x_low, kernel, bias, y, y_pixel, low, high):
    """Channels c_first..c_last of output pixels first..last, counted over all images, written `y_pixel` apart.

    y is the address of channel 0 of the first pixel. Assumes: g.multiplier is 1.
    """
    itemsize = size_of(dtype)
    step = channel_block(dtype, g.width * g.kernel_height)
    line = first // g.out_width
    first_n, first_p, first_q = line // g.out_height, line % g.out_height, first % g.out_width
    for c in range(c_first, c_last, step):
        count = min(step, c_last - c)
        pixel, n, p, q = first, first_n, first_p, first_q
        while pixel < last:  # the part of an output line that lies in first..last
            q_last = min(g.out_width, q + last - pixel)
            target = y + (pixel - first) * y_pixel * itemsize
            _forward_span(dtype, g, c, count, n, p, q, q_last, x, x_low, kernel, bias, target, y_pixel, low, high)
            pixel, q, p = pixel + q_last - q, 0, p + 1
            if p == g.out_height:
                n, p = n + 1, 0


@kernel
def _band(width, channels, itemsize):
    """Lines of an image worked on together, all their channels: few enough to stay in L2."""
    return max(1, BAND_BYTES // max(1, width * channels * itemsize))


@parallel_kernel
def forward_single(dtype, worker, workers, g, x, x_low, kernel, bias, y, low, high):
    """A worker's share of the output lines. Assumes: g.multiplier is 1.

    Parallel over: output lines.
    """
    itemsize = size_of(dtype)
    first, last = share(g.batch * g.out_height, worker, workers)
    step = _band(g.out_width, g.channels, itemsize)
    for line in range(first, last, step):
        m0, m1 = line * g.out_width, min(line + step, last) * g.out_width
        target = y + m0 * g.channels * itemsize
        forward_pixels(dtype, g, 0, g.channels, m0, m1, x, x_low, kernel, bias, target, g.channels, low, high)


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
def _input_line(dtype, g, c, count, n, h, kernel, dy, d_x):
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
            low, high,
        )  # fmt: skip


@kernel
def input_lines(dtype, g, first, last, kernel, dy, d_x):
    """Lines first..last of d_x, counted over all images. Assumes: g.multiplier is 1."""
    step = channel_block(dtype, g.out_width * g.kernel_height)
    for c in range(0, g.channels, step):
        for i in range(first, last):
            _input_line(dtype, g, c, min(step, g.channels - c), i // g.height, i % g.height, kernel, dy, d_x)


@parallel_kernel
def input_gradient(dtype, worker, workers, g, kernel, dy, d_x):
    """A worker's share of the lines of d_x. Assumes: g.multiplier is 1.

    Parallel over: input lines.
    """
    first, last = share(g.batch * g.height, worker, workers)
    band = _band(g.width, g.channels, size_of(dtype))
    for line in range(first, last, band):
        input_lines(dtype, g, line, min(line + band, last), kernel, dy, d_x)


@compiled_once
def _correlate_columns(
    dtype, g, c, count, kernel_rows, s, n_first, n_last, p_first, p_last, r, q_first, q_last, x, dy, out
):
    """Adds columns q_first..q_last of output lines p_first..p_last to tap (r, s) of d_kernel.

    With `kernel_rows` to the taps from s = 0 on of so many rows from r on, of which the first column may lack its
    first, the last its last.
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
def _whole_lines(g, p_first, p_last):
    """Those at which all rows of a kernel of SLIDING_TAPS rows meet it, taken at once; (p_last, p_last) for none."""
    if g.kernel_height != SLIDING_TAPS:
        return p_last, p_last
    top_first, top_last = _tap_lines(g, 0, p_first, p_last)
    end_first, end_last = _tap_lines(g, SLIDING_TAPS - 1, p_first, p_last)
    first, last = max(top_first, end_first), min(top_last, end_last)
    return (first, last) if first < last else (p_last, p_last)


@kernel
def _correlate_sliding(dtype, g, c, count, n_first, n_last, p_first, p_last, q_first, q_last, x, dy, d_kernel):
    """Adds columns whose middle tap is inside the image: all taps at once over the lines that meet every row of the
    kernel, where it has three; then a row at a time over the rest."""
    whole_first, whole_last = _whole_lines(g, p_first, p_last)
    if whole_first < whole_last:
        _correlate_columns(
            dtype, g, c, count, SLIDING_TAPS, 0, n_first, n_last, whole_first, whole_last, 0, q_first, q_last,
            x, dy, d_kernel,
        )  # fmt: skip
    for r in range(g.kernel_height):
        p0, p1 = _tap_lines(g, r, p_first, p_last)
        for first, last in ((p0, min(p1, whole_first)), (max(p0, whole_last), p1)):
            _correlate_columns(
                dtype, g, c, count, 1, 0, n_first, n_last, first, last, r, q_first, q_last, x, dy, d_kernel
            )


@kernel
def _correlate(dtype, g, n_first, n_last, p_first, p_last, x, dy, d_kernel):
    """Adds output lines p_first..p_last of images n_first..n_last to d_kernel.

    Where a row's taps slide, all of them at once over the columns whose middle tap is inside; then a tap at a time
    over the rest.
    """
    slide_first, slide_last = 0, 0
    if slides(g.kernel_width, g.dilation_width, g.stride_width):
        slide_first, slide_last = _tap_columns(g, 1)
    for c in range(0, g.channels, CORRELATED_CHANNELS):
        count = min(CORRELATED_CHANNELS, g.channels - c)
        if slide_first < slide_last:
            _correlate_sliding(
                dtype, g, c, count, n_first, n_last, p_first, p_last, slide_first, slide_last, x, dy, d_kernel
            )
        for r in range(g.kernel_height):
            p0, p1 = _tap_lines(g, r, p_first, p_last)
            for s in range(g.kernel_width):
                q0, q1 = _tap_columns(g, s)
                for first, last in ((q0, min(q1, slide_first)), (max(q0, slide_last), q1)):
                    _correlate_columns(
                        dtype, g, c, count, 0, s, n_first, n_last, p0, p1, r, first, last, x, dy, d_kernel
                    )


@kernel
def lines_at_once(dtype, g, size):
    """Output lines that fit into `size` bytes together with those of x that they are made of."""
    line_bytes = (g.width * g.stride_height + g.out_width) * g.channels * size_of(dtype)
    return max(1, size // max(1, line_bytes))


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
def correlate_lines(dtype, g, line, images, count, x, dy, d_kernel):
    """Adds what `next_lines` says of the output lines from `line` on to d_kernel."""
    n, p = line // g.out_height, line % g.out_height
    if images > 0:
        _correlate(dtype, g, n, n + images, 0, g.out_height, x, dy, d_kernel)
    else:
        _correlate(dtype, g, n, n + 1, p, p + count, x, dy, d_kernel)


@parallel_kernel
def _kernel_gradient(dtype, worker, workers, g, x, dy, sums):
    """A worker's groups of output lines, each group summed into its own copy of d_kernel.

    Parallel over: a fixed number of groups of output lines.
    """
    itemsize = size_of(dtype)
    at_once = lines_at_once(dtype, g, BAND_BYTES)
    size = g.kernel_height * g.kernel_width * g.channels
    first_group, last_group = share(GRADIENT_GROUPS, worker, workers)
    for group in range(first_group, last_group):
        out = sums + group * size * itemsize
        view(dtype, out, size)[:] = 0
        line, last = share(g.batch * g.out_height, group, GRADIENT_GROUPS)
        while line < last:
            images, count = next_lines(g, line, last, at_once)
            correlate_lines(dtype, g, line, images, count, x, dy, out)
            line += count


@kernel
def kernel_gradient(dtype, g, x, dy, d_kernel, accumulate, threads):
    """Fills d_kernel, or adds to it with `accumulate`; says whether there was memory. Assumes: g.multiplier is 1."""
    size = g.kernel_height * g.kernel_width * g.channels
    sums = try_take(dtype, GRADIENT_GROUPS * size)
    if sums == 0:
        return False
    _kernel_gradient(dtype, GRADIENT_GROUPS if threads > 1 else 1, g, x, dy, sums)
    add_groups(dtype, GRADIENT_GROUPS, size, sums, d_kernel, accumulate)
    give(sums)
    return True


@kernel
def convolve(dtype, g, x, x_low, kernel, bias, y, low, high, threads):
    """Fills y `[N,P,Q,C*M]`. bias may be 0 (absent). What of x is lower than x_low counts as x_low."""
    if g.multiplier == 1:
        forward_single(dtype, threads, g, x, x_low, kernel, bias, y, low, high)
    else:
        repeated = take(dtype, repeated_length(g))
        repeat_channels(dtype, threads, g, x, repeated)
        forward_single(dtype, threads, single(g), repeated, x_low, kernel, bias, y, low, high)
        give(repeated)


@entry
def forward(dtype, g, x, kernel, bias, y, x_low, low, high, threads):
    """Fills y `[N,P,Q,C*M]`. bias may be 0 (absent)."""
    convolve(dtype, g, x, x_low, kernel, bias, y, low, high, threads)


@kernel
def _backward_single(dtype, g, x, kernel, dy, d_x, d_kernel, d_bias, threads):
    """Fills what is wanted of d_x, d_kernel and d_bias; says whether there was memory. Assumes: g.multiplier is 1."""
    had_memory = True
    if d_x != 0:
        input_gradient(dtype, threads, g, kernel, dy, d_x)
    if d_kernel != 0:
        had_memory &= kernel_gradient(dtype, g, x, dy, d_kernel, False, threads)
    if d_bias != 0:
        had_memory &= column_sums(dtype, g.batch * g.out_height * g.out_width, g.channels, dy, d_bias, threads)
    return had_memory


@entry
def backward(dtype, g, x, kernel, dy, d_x, d_kernel, d_bias, threads):
    """Fills d_x, d_kernel and d_bias for dy `[N,P,Q,C*M]`, each where its address is not 0."""
    if g.multiplier == 1:
        require(_backward_single(dtype, g, x, kernel, dy, d_x, d_kernel, d_bias, threads))
    else:
        length = repeated_length(g)
        repeated = take(dtype, 2 * length if d_x != 0 else length)
        d_repeated = repeated + length * size_of(dtype) if d_x != 0 else 0
        repeat_channels(dtype, threads, g, x, repeated)
        wide = single(g)
        had_memory = _backward_single(dtype, wide, repeated, kernel, dy, d_repeated, d_kernel, d_bias, threads)
        if d_x != 0:
            sum_repeated(dtype, threads, g, d_repeated, d_x)
        give(repeated)
        require(had_memory)
