"""One line of a depthwise convolution, forward and backward to the input, cut into register tiles.

Where taps are several pixels apart, so many lines are interleaved, and each is taken for itself. Three, five or seven
taps as far apart as the pixels slide: any pixel whose middle tap is inside the image goes into a tile of several, in
which taps that fall outside are left out. With other taps, the pixels whose taps are all inside go several at a time,
the few at the borders one at a time with fewer taps.
"""

from __future__ import annotations

from .depthwise_tiles import (
    PIXELS,
    SLIDES,
    SLIDING_TAPS,
    WIDE_SLIDING_TAPS,
    depthwise_tile,
    sliding_tile,
    wide_sliding_tile,
)
from .jit import kernel
from .memory import ceil_div, size_of
from .pool import compiled_once
from .simd import lanes
from .tiles import CHOSEN

LINES_BYTES = 32 * 1024  # what a few lines need of L1
ALL_CHANNELS = 1 << 40


@kernel
def channel_block(dtype, pixels):
    """Channels taken at once: so many that `pixels` pixels, which consecutive lines read again, are still in L1.

    All, where not even the least would be: the hardware reads ahead of whole pixels.
    """
    least = CHOSEN.span * lanes(dtype)
    blocks = LINES_BYTES // max(1, pixels * least * size_of(dtype))
    return blocks * least if blocks > 0 else ALL_CHANNELS


@kernel
def inside(origin, step, count, size):
    """The j in [first, last) of 0..count for which 0 <= origin + j*step < size. step is not 0."""
    if step == 1:  # nearly always, and nothing to divide
        first, last = -origin, size - origin
    elif step > 0:
        first, last = ceil_div(-origin, step), (size - 1 - origin) // step + 1
    else:
        first, last = ceil_div(origin - size + 1, -step), origin // -step + 1
    first = min(max(first, 0), count)
    return first, max(first, min(last, count))


@kernel
def interleaved(taps, tap_step, pixel_step):
    """As how many lines a line is taken: where taps are several pixels apart, they are one apart in each of those."""
    return tap_step // pixel_step if taps > 1 and tap_step % pixel_step == 0 else 1


@kernel
def slides(taps, tap_step, pixel_step):
    """Whether a row's taps are those of a sliding tile, which loads each input once a row."""
    return tap_step == pixel_step and (taps == SLIDING_TAPS or taps in WIDE_SLIDING_TAPS)


@compiled_once
def _tiles(
    dtype, count, first, last, inner_first, inner_last, x, x_row, x_low, rows, origin, pixel_step, tap_step, taps, size,
    channels, kernel, kernel_row, kernel_tap, bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """Pixels first..last for `line_span`, several at once where they lie in inner_first..inner_last."""
    itemsize = size_of(dtype)
    i = first
    while i < last:
        x_at, y_at = x + (origin + i * pixel_step) * channels * itemsize, y + i * y_pixel * itemsize
        pixels, tap, tap_count = 1, 0, taps
        if inner_first <= i and i + PIXELS <= inner_last:
            pixels = PIXELS
        else:
            tap, tap_end = inside(origin + i * pixel_step, tap_step, taps, size)
            tap_count = tap_end - tap
        depthwise_tile(
            dtype, pixels, count, rows, tap_count, x_at + tap * tap_step * channels * itemsize, x_row,
            tap_step * channels, pixel_step * channels, x_low, kernel + tap * kernel_tap * itemsize, kernel_row,
            kernel_tap, bias, y_at, y_pixel, past_caches, low, high,
        )  # fmt: skip
        i += pixels


@kernel
def sliding_pixels(left):
    """Of `left` pixels, how many the next sliding tile takes."""
    for pixels in SLIDES:
        if left >= pixels:
            return pixels
    return 0


@compiled_once
def _slide(
    dtype, count, pixels, column_first, column_last, x, x_row, x_low, rows, x_pixel, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """`pixels` pixels side by side of three taps, of whose columns only column_first..column_last are in the image."""
    itemsize = size_of(dtype)
    i = 0
    while i < pixels:
        at_once = sliding_pixels(pixels - i)
        sliding_tile(
            dtype, SLIDING_TAPS, at_once, column_first - i, column_last - i, count, rows, x + i * x_pixel * itemsize,
            x_row, x_pixel, x_low, kernel, kernel_row, kernel_tap, bias, y + i * y_pixel * itemsize, y_pixel,
            past_caches, low, high,
        )  # fmt: skip
        i += at_once


@compiled_once
def _slide_wide(
    dtype, count, taps, pixels, column_first, column_last, x, x_row, x_low, rows, x_pixel, kernel, kernel_row,
    kernel_tap, bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """The same for `taps` of WIDE_SLIDING_TAPS, by itself as its tile is."""
    itemsize = size_of(dtype)
    i = 0
    while i < pixels:
        at_once = sliding_pixels(pixels - i)
        wide_sliding_tile(
            dtype, taps, at_once, column_first - i, column_last - i, count, rows, x + i * x_pixel * itemsize,
            x_row, x_pixel, x_low, kernel, kernel_row, kernel_tap, bias, y + i * y_pixel * itemsize, y_pixel,
            past_caches, low, high,
        )  # fmt: skip
        i += at_once


@kernel
def line_span(
    dtype, count, first, last, x, x_row, x_low, rows, origin, pixel_step, tap_step, taps, size, channels,
    kernel, kernel_row, kernel_tap, bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """Pixels first..last of a line, pixel i and tap j reading column `origin + i*pixel_step + j*tap_step` of x.

    x is the address of column 0 in the line's first row of `size` columns, `channels` apart; y that of pixel `first`.
    `count` channels are computed.
    """
    itemsize = size_of(dtype)
    if tap_step < 0:  # the same taps, from the last to the first
        origin, tap_step = origin + (taps - 1) * tap_step, -tap_step
        kernel, kernel_tap = kernel + (taps - 1) * kernel_tap * itemsize, -kernel_tap
    lines = interleaved(taps, tap_step, pixel_step)
    for i in range(first, min(last, first + lines)):
        _line(
            dtype, count, ceil_div(last - i, lines), x, x_row, x_low, rows, origin + i * pixel_step, pixel_step * lines,
            tap_step, taps, size, channels, kernel, kernel_row, kernel_tap, bias, y + (i - first) * y_pixel * itemsize,
            y_pixel * lines, past_caches, low, high,
        )  # fmt: skip


@kernel
def _line(
    dtype, count, pixels, x, x_row, x_low, rows, origin, pixel_step, tap_step, taps, size, channels,
    kernel, kernel_row, kernel_tap, bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """The first `pixels` pixels for `line_span`, from address y on."""
    itemsize = size_of(dtype)
    slide_first, slide_last, inner_first, inner_last = pixels, pixels, pixels, pixels
    if slides(taps, tap_step, pixel_step):
        slide_first, slide_last = inside(origin + taps // 2 * tap_step, pixel_step, pixels, size)
    else:
        head_first, head_last = inside(origin, pixel_step, pixels, size)
        tail_first, tail_last = inside(origin + (taps - 1) * tap_step, pixel_step, pixels, size)
        inner_first, inner_last = max(head_first, tail_first), min(head_last, tail_last)
    if slide_first < slide_last:
        column, sliding = origin + slide_first * pixel_step, slide_last - slide_first
        column_first, column_last = inside(column, pixel_step, sliding + taps - 1, size)
        x_at, y_at = x + column * channels * itemsize, y + slide_first * y_pixel * itemsize
        if taps == SLIDING_TAPS:
            _slide(
                dtype, count, sliding, column_first, column_last, x_at, x_row, x_low, rows, pixel_step * channels,
                kernel, kernel_row, kernel_tap, bias, y_at, y_pixel, past_caches, low, high,
            )  # fmt: skip
        else:
            _slide_wide(
                dtype, count, taps, sliding, column_first, column_last, x_at, x_row, x_low, rows, pixel_step * channels,
                kernel, kernel_row, kernel_tap, bias, y_at, y_pixel, past_caches, low, high,
            )  # fmt: skip
    for part_first, part_last in ((0, slide_first), (slide_last, pixels)):
        _tiles(
            dtype, count, part_first, part_last, inner_first, inner_last, x, x_row, x_low, rows, origin, pixel_step,
            tap_step, taps, size, channels, kernel, kernel_row, kernel_tap, bias, y, y_pixel, past_caches, low, high,
        )  # fmt: skip
