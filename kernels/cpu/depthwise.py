"""Depthwise convolution on the CPU, forward and backward.

    y[n,p,q,c]      = clamp(bias[c] + sum over r, s of x[n, p*sh+r*dh-top, q*sw+s*dw-left, c] * kernel[r,s,c])
    d_x[n,h,w,c]    = sum over r, s of dy[n,p,q,c] * kernel[r,s,c], (p, q) the output pixel that reads (h, w) at (r, s)
    d_kernel[r,s,c] = sum over n, p, q of x[n, p*sh+r*dh-top, q*sw+s*dw-left, c] * dy[n,p,q,c]
    d_bias[c]       = sum over n, p, q of dy[n,p,q,c]

Addresses of C-contiguous channels-last float32 or float64 arrays, forward also bfloat16 ones, which are summed in
float32. A depth multiplier M > 1 is served by repeating each input channel M times first. Taps that fall outside the
image are skipped, not multiplied by zeros. Forward, what of x is lower than `x_low` counts as that: a ReLU before the
convolution costs nothing. The gradients of x and kernel are those of `depthwise_gradients`.
"""

from __future__ import annotations

from .depthwise_gradients import gradients
from .depthwise_line import ALL_CHANNELS, channel_block, inside, line_span
from .gemm import past_caches
from .jit import entry, kernel
from .memory import fence, share, size_of
from .multiplier import repeat_channels, repeated_length, single, sum_repeated
from .pointwise import column_sums
from .pool import parallel_kernel
from .scratch import give, require, take

BAND_BYTES = 192 * 1024  # lines worked on together stay in L2


@kernel
def _forward_span(dtype, g, c, count, n, p, q_first, q_last, x, x_low, kernel, bias, y, y_pixel, streamed, low, high):
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
        bias + c * itemsize if bias != 0 else 0, y + c * itemsize, y_pixel, streamed, low, high,
    )  # fmt: skip


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
def forward_block(dtype, g):
    """Channels taken at once. All, where most of an output line's input is new: memory is read fastest in its order."""
    if 2 * g.stride_height > g.kernel_height:
        return ALL_CHANNELS
    return channel_block(dtype, g.width * g.kernel_height)


@kernel
def forward_pixels(dtype, g, c_first, c_last, first, last, x, x_low, kernel, bias, y, y_pixel, streamed, low, high):
    """Channels c_first..c_last of output pixels first..last, counted over all images, written `y_pixel` apart.

    y is the address of channel 0 of the first pixel. `streamed` is what `gemm.past_caches` says of y. Assumes:
    g.multiplier is 1.
    """
    itemsize = size_of(dtype)
    step = forward_block(dtype, g)
    line = first // g.out_width
    first_n, first_p, first_q = line // g.out_height, line % g.out_height, first % g.out_width
    for c in range(c_first, c_last, step):
        count = min(step, c_last - c)
        pixel, n, p, q = first, first_n, first_p, first_q
        while pixel < last:  # the part of an output line that lies in first..last
            q_last = min(g.out_width, q + last - pixel)
            target = y + (pixel - first) * y_pixel * itemsize
            _forward_span(
                dtype, g, c, count, n, p, q, q_last, x, x_low, kernel, bias, target, y_pixel, streamed, low, high
            )
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
    streamed = past_caches(dtype, g.batch * g.out_height * g.out_width, g.channels, y)
    for line in range(first, last, step):
        m0, m1 = line * g.out_width, min(line + step, last) * g.out_width
        target = y + m0 * g.channels * itemsize
        forward_pixels(dtype, g, 0, g.channels, m0, m1, x, x_low, kernel, bias, target, g.channels, streamed, low, high)
    fence()


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
    if d_x != 0 or d_kernel != 0:
        had_memory &= gradients(dtype, g, x, kernel, dy, d_x, d_kernel, False, threads)
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
