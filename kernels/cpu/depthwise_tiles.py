"""The inner loops of depthwise convolution, each a register tile written out in vector code.

`depthwise_tile`  a few pixels, forward, and backward to the input
`sliding_tile`    the same for three taps a row, a pixel apart: each input is loaded once a row, not once a tap
`correlate_tile`  one tap of a kernel's gradient
`correlate_rows`  three taps of it, a pixel apart, or the nine of three rows

Addresses are integers and strides count elements, so one compiled function of each serves every shape and layout.
`dtype` is np.float32 or np.float64, of the first two also BFLOAT16. Nothing is read or written outside the tile that
the arguments describe.
"""

from __future__ import annotations

from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import Vectors, arithmetic_type, emit_cases, index, vectors_of
from .tiles import CHOSEN

PIXELS = CHOSEN.pixels
SLIDES = CHOSEN.slides
SLIDING_TAPS = 3


def _over_channels(emit: Vectors, channels, span: int, body) -> None:
    """Runs `body(first channel, vectors, mask)` over all channels: `span` vectors at once, one, then a part of one."""
    builder = emit.builder
    done = index(0)
    for vectors in (span, 1):
        step = index(vectors * emit.lanes)
        blocks = builder.sdiv(builder.sub(channels, done), step)
        with cgutils.for_range(builder, blocks) as loop:
            body(builder.add(done, builder.mul(loop.index, step)), vectors, None)
        done = builder.add(done, builder.mul(blocks, step))
    with builder.if_then(builder.icmp_signed("<", done, channels)):
        body(done, 1, emit.mask(builder.sub(channels, done)))


@intrinsic
def depthwise_tile(
    typing_context, dtype, pixels, channels, rows, taps, x, x_row, x_tap, x_pixel, x_low, kernel, kernel_row,
    kernel_tap, bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """y[i*y_pixel + c] = clamp(bias[c] + sum over r < rows, s < taps of
              max(x_low, x[r*x_row + s*x_tap + i*x_pixel + c]) * kernel[r*kernel_row + s*kernel_tap + c])

    for i < pixels, c < channels. `pixels` is PIXELS or 1; bias is an address of `channels` values, or 0. Whole vectors
    are written past the caches if `past_caches` is not 0: then y's pixels lie at multiples of one.

    Strides are free (negative too), which is how one loop serves any stride and dilation, forward and backward.
    """

    def codegen(context, builder, signature, arguments):
        pixels, channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        with builder.if_else(builder.icmp_signed("==", pixels, index(PIXELS))) as (then, otherwise):
            for branch, count in ((then, PIXELS), (otherwise, 1)):
                with branch:
                    _over_channels(
                        emit,
                        channels,
                        CHOSEN.span,
                        lambda first, span, mask, count=count: _depthwise_block(emit, count, first, span, mask, *rest),
                    )
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    signature = types.void(dtype, *[types.intp] * 8, bound, *[types.intp] * 7, bound, bound)
    return signature, codegen


def _depthwise_block(
    emit, pixels, first, span, mask, rows, taps, x, x_row, x_tap, x_pixel, x_low, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """`pixels` pixels x `span` channel vectors from channel `first` on, accumulated in registers over all taps."""
    builder = emit.builder
    masks = [mask] * span
    accumulators = _accumulators(emit, "dw", pixels, first, masks, bias)
    x_first, x_lows = emit.at(emit.pointer(x), first), emit.splat(x_low)
    kernel_first = emit.at(emit.pointer(kernel), first)
    with cgutils.for_range(builder, rows) as row_loop:
        x_line = emit.at(x_first, builder.mul(row_loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(row_loop.index, kernel_row))
        with cgutils.for_range(builder, taps) as tap_loop:
            x_taps = emit.at(x_line, builder.mul(tap_loop.index, x_tap))
            weights = emit.load_span(emit.at(kernel_line, builder.mul(tap_loop.index, kernel_tap)), masks)
            for i, accumulator in enumerate(accumulators):
                source = emit.at(x_taps, builder.mul(x_pixel, index(i)))
                for j, register in enumerate(accumulator):
                    value = emit.at_least(x_lows, emit.load(emit.at(source, index(j * emit.lanes)), mask))
                    builder.store(emit.multiply_add(value, weights[j], builder.load(register)), register)
    _store_pixels(emit, accumulators, first, masks, y, y_pixel, past_caches, low, high)


@intrinsic
def sliding_tile(
    typing_context, dtype, pixels, cut_left, cut_right, channels, rows, x, x_row, x_pixel, x_low,
    kernel, kernel_row, kernel_tap, bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """`depthwise_tile` for SLIDING_TAPS taps with x_tap == x_pixel.

    `pixels` is one of SLIDES. Where `cut_left` is not 0, the first pixel's first tap falls outside the image and is
    left out; `cut_right` tells the same of the last pixel's last tap. x is where the first tap would read.
    """

    def codegen(context, builder, signature, arguments):
        pixels, cut_left, cut_right, channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        cuts = [builder.icmp_signed("!=", cut, index(0)) for cut in (cut_left, cut_right)]
        step = index(CHOSEN.slide_span * emit.lanes)
        blocks = builder.sdiv(channels, step)
        left = builder.srem(channels, step)

        def emit_case(count):
            with cgutils.for_range(builder, blocks) as block:
                first = builder.mul(block.index, step)
                _sliding(emit, count, cuts, first, [None] * CHOSEN.slide_span, *rest)
            with builder.if_then(builder.icmp_signed(">", left, index(0)), likely=False):
                masks = [emit.mask(left, j * emit.lanes) for j in range(CHOSEN.slide_span)]
                _sliding(emit, count, cuts, builder.mul(blocks, step), masks, *rest)

        emit_cases(builder, pixels, SLIDES, emit_case)
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    signature = types.void(dtype, *[types.intp] * 8, bound, *[types.intp] * 7, bound, bound)
    return signature, codegen


def _sliding(
    emit, pixels, cuts, first, masks, rows, x, x_row, x_pixel, x_low, kernel, kernel_row, kernel_tap, bias, y, y_pixel,
    past_caches, low, high,
):  # fmt: skip
    """`pixels` pixels x `masks` channel vectors from channel `first` on.

    What the next tile is the first to read or write comes into L1. Each row asks for a part: all lines at once would
    fill the queue of what the core waits for, and the next tile's first loads would wait behind them.
    """
    builder, columns = emit.builder, pixels + SLIDING_TAPS - 1
    accumulators = _accumulators(emit, "slide", pixels, first, masks, bias)
    x_first, kernel_first = emit.at(emit.pointer(x), first), emit.at(emit.pointer(kernel), first)
    x_lows = emit.splat(x_low)
    last_line, y_first = (
        emit.at(x_first, builder.mul(builder.sub(rows, index(1)), x_row)),
        emit.at(emit.pointer(y), first),
    )
    streams = builder.icmp_signed("!=", past_caches, index(0))  # then nothing of y is asked for: x's line is there
    y_asked, y_step = builder.select(streams, x_first, y_first), builder.select(streams, index(0), y_pixel)
    asked = -(-pixels // SLIDING_TAPS)  # pixels a row: all of them, where rows are as many as taps
    with cgutils.for_range(builder, rows) as loop:
        for i in range(asked):
            pixel = builder.add(builder.mul(loop.index, index(asked)), index(i))
            column, behind = (builder.add(pixel, index(step)) for step in (columns, pixels))
            emit.prefetch_span(emit.at(last_line, builder.mul(x_pixel, column)), len(masks))
            emit.prefetch_span(emit.at(y_asked, builder.mul(y_step, behind)), len(masks), write=True)
        x_line = emit.at(x_first, builder.mul(loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(loop.index, kernel_row))
        weights = [
            emit.load_span(emit.at(kernel_line, builder.mul(kernel_tap, index(tap))), masks)
            for tap in range(SLIDING_TAPS)
        ]

        def add_column(column, x_line=x_line, weights=weights):
            values = emit.load_span(emit.at(x_line, builder.mul(x_pixel, index(column))), masks)
            values, used = [emit.at_least(x_lows, value) for value in values], []
            for tap in range(max(0, column - pixels + 1), min(SLIDING_TAPS, column + 1)):
                for value, weight, register in zip(values, weights[tap], accumulators[column - tap], strict=True):
                    builder.store(emit.multiply_add(value, weight, builder.load(register)), register)
                    used.append(register)
            emit.in_order(used)

        for column in range(columns):
            if 0 < column < columns - 1:
                add_column(column)
            else:
                with builder.if_then(builder.not_(cuts[0 if column == 0 else 1])):
                    add_column(column)
    _store_pixels(emit, accumulators, first, masks, y, y_pixel, past_caches, low, high)


def _accumulators(emit: Vectors, name: str, pixels: int, first, masks: list, bias) -> list:
    """Registers for pixels x `masks` vectors that hold the bias, or zero where its address is 0."""
    builder, span = emit.builder, len(masks)
    label = f"{name}{pixels}_{span}_{'m' if masks[0] else 'f'}"
    accumulators = [[emit.register(f"{label}_{i}_{j}") for j in range(span)] for i in range(pixels)]
    for j in range(span):
        builder.store(emit.zero(), accumulators[0][j])
    with builder.if_then(builder.icmp_signed("!=", bias, index(0))):
        for j, value in enumerate(emit.load_span(emit.at(emit.pointer(bias), first), masks)):
            builder.store(value, accumulators[0][j])
    for row in accumulators[1:]:
        for j in range(span):
            builder.store(builder.load(accumulators[0][j]), row[j])
    return accumulators


def _store_pixels(emit: Vectors, accumulators, first, masks: list, y, y_pixel, past_caches, low, high) -> None:
    """Clamps the accumulators and writes them, a pixel each `y_pixel` elements."""
    builder = emit.builder
    with builder.if_then(emit.bounded(low, high)):
        lows, highs = emit.splat(low), emit.splat(high)
        for register in (register for accumulator in accumulators for register in accumulator):
            builder.store(emit.clamp(builder.load(register), lows, highs), register)
    y_first = emit.at(emit.pointer(y), first)

    def store(write):
        for i, accumulator in enumerate(accumulators):
            target = emit.at(y_first, builder.mul(y_pixel, index(i)))
            for j, (register, mask) in enumerate(zip(accumulator, masks, strict=True)):
                write(builder.load(register), emit.at(target, index(j * emit.lanes)), mask)

    if masks[0] is not None or emit.factors > 1:
        store(emit.store)
        return
    with builder.if_else(builder.icmp_signed("!=", past_caches, index(0)), likely=False) as (streamed, stored):
        with streamed:
            store(lambda value, target, mask: emit.stream(value, target))
        with stored:
            store(emit.store)


@intrinsic
def correlate_tile(
    typing_context, dtype, channels, images, rows, columns, x, x_image, x_row, x_pixel, y, y_image, y_row, y_pixel, out,
):  # fmt: skip
    """out[c] += sum over n < images, p < rows, q < columns of
    x[n*x_image + p*x_row + q*x_pixel + c] * y[n*y_image + p*y_row + q*y_pixel + c]     for c < channels."""

    def codegen(context, builder, signature, arguments):
        channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        _over_channels(
            emit, channels, 2 * CHOSEN.span, lambda first, span, mask: _correlate_block(emit, first, span, mask, *rest)
        )
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 13), codegen


def _correlate_block(
    emit, first, span, mask, images, rows, columns, x, x_image, x_row, x_pixel, y, y_image, y_row, y_pixel, out
):
    """`span` channel vectors from channel `first` on, summed in registers over every pixel."""
    builder = emit.builder
    sums = [emit.register(f"sum{span}_{'m' if mask else 'f'}_{j}") for j in range(span)]
    target = emit.at(emit.pointer(out), first)
    for j, register in enumerate(sums):
        builder.store(emit.load(emit.at(target, index(j * emit.lanes)), mask), register)
    x_first, y_first = emit.at(emit.pointer(x), first), emit.at(emit.pointer(y), first)
    with cgutils.for_range(builder, images) as image:
        x_plane = emit.at(x_first, builder.mul(image.index, x_image))
        y_plane = emit.at(y_first, builder.mul(image.index, y_image))
        with cgutils.for_range(builder, rows) as row:
            x_line = emit.at(x_plane, builder.mul(row.index, x_row))
            y_line = emit.at(y_plane, builder.mul(row.index, y_row))
            with cgutils.for_range(builder, columns) as column:
                x_at = emit.at(x_line, builder.mul(column.index, x_pixel))
                y_at = emit.at(y_line, builder.mul(column.index, y_pixel))
                for j, register in enumerate(sums):
                    x_value = emit.load(emit.at(x_at, index(j * emit.lanes)), mask)
                    y_value = emit.load(emit.at(y_at, index(j * emit.lanes)), mask)
                    builder.store(emit.multiply_add(x_value, y_value, builder.load(register)), register)
    for j, register in enumerate(sums):
        emit.store(builder.load(register), emit.at(target, index(j * emit.lanes)), mask)


@intrinsic
def correlate_rows(
    typing_context, dtype, cut_left, cut_right, kernel_rows, channels, images, rows, columns,
    x, x_image, x_row, x_pixel, x_tap_row, y, y_image, y_row, y_pixel, out, out_row, out_tap,
):  # fmt: skip
    """out[r*out_row + s*out_tap + c] += sum over n < images, p < rows, q < columns of
    x[n*x_image + p*x_row + r*x_tap_row + (q+s)*x_pixel + c] * y[n*y_image + p*y_row + q*y_pixel + c]

    for r < kernel_rows, s < SLIDING_TAPS, c < channels: `correlate_tile` for all taps, with each y loaded once for all
    and each x once for those of its row. `kernel_rows` is 1 or SLIDING_TAPS. Where `cut_left` is not 0, the first
    column's first tap is left out, where `cut_right` the last one's last.
    """

    def codegen(context, builder, signature, arguments):
        cut_left, cut_right, kernel_rows, channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        cuts = [builder.icmp_signed("!=", cut, index(0)) for cut in (cut_left, cut_right)]
        emit_cases(
            builder, kernel_rows, (1, SLIDING_TAPS),
            lambda height: _over_channels(
                emit, channels, CHOSEN.slide_span,
                lambda first, span, mask: _correlate_taps(emit, height, cuts, first, [mask] * span, *rest),
            ),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 19), codegen


def _correlate_taps(
    emit, height, cuts, first, masks, images, rows, columns, x, x_image, x_row, x_pixel, x_tap_row,
    y, y_image, y_row, y_pixel, out, out_row, out_tap,
):  # fmt: skip
    """height x SLIDING_TAPS x `masks` sums in registers, over every pixel."""
    builder = emit.builder
    label = f"taps{height}_{len(masks)}_{'m' if masks[0] else 'f'}"
    sums, targets = [], []
    for r in range(height):
        sums.append([[emit.register(f"{label}_{r}_{s}_{j}") for j in range(len(masks))] for s in range(SLIDING_TAPS)])
        line = emit.at(emit.at(emit.pointer(out), first), builder.mul(out_row, index(r)))
        targets.append([emit.at(line, builder.mul(out_tap, index(s))) for s in range(SLIDING_TAPS)])
    taps = [(sums[r][s], targets[r][s]) for r in range(height) for s in range(SLIDING_TAPS)]
    for registers, target in taps:
        for value, register in zip(emit.load_span(target, masks), registers, strict=True):
            builder.store(value, register)
    x_first, y_first = emit.at(emit.pointer(x), first), emit.at(emit.pointer(y), first)
    with cgutils.for_range(builder, images) as image, cgutils.for_range(builder, rows) as row:
        x_line = emit.at(emit.at(x_first, builder.mul(image.index, x_image)), builder.mul(row.index, x_row))
        y_line = emit.at(emit.at(y_first, builder.mul(image.index, y_image)), builder.mul(row.index, y_row))
        x_lines = [emit.at(x_line, builder.mul(x_tap_row, index(r))) for r in range(height)]
        _correlate_line(emit, cuts, sums, masks, columns, x_lines, x_pixel, y_line, y_pixel)
    for registers, target in taps:
        for j, (register, mask) in enumerate(zip(registers, masks, strict=True)):
            emit.store(builder.load(register), emit.at(target, index(j * emit.lanes)), mask)


def _correlate_line(emit: Vectors, cuts, sums, masks: list, columns, x_lines, x_pixel, y, y_pixel) -> None:
    """Adds a line to the sums: its cut ends, then what lies between, several pixels at once and one at a time."""
    builder = emit.builder

    def pixels(first, count, taps):
        x_at = [emit.at(line, builder.mul(first, x_pixel)) for line in x_lines]
        y_at = emit.at(y, builder.mul(first, y_pixel))
        _correlate_pixels(emit, sums, count, taps, masks, x_at, x_pixel, y_at, y_pixel)

    left, right = cuts
    last = builder.sub(columns, index(1))
    alone = builder.and_(builder.and_(left, right), builder.icmp_signed("==", last, index(0)))
    with builder.if_then(left):
        pixels(index(0), 1, (1,))
        with builder.if_then(builder.not_(alone)):
            pixels(index(0), 1, (2,))
    with builder.if_then(builder.and_(right, builder.not_(alone))):
        pixels(last, 1, (0, 1))
    begin, end = builder.zext(left, columns.type), builder.sub(columns, builder.zext(right, columns.type))
    several = builder.sdiv(builder.sub(end, begin), index(PIXELS))  # 0 for a pixel alone, where end is begin - 1
    single = builder.add(begin, builder.mul(several, index(PIXELS)))
    for start, blocks, count in ((begin, several, PIXELS), (single, builder.sub(end, single), 1)):
        with cgutils.for_range(builder, blocks) as block:
            pixels(builder.add(start, builder.mul(block.index, index(count))), count, range(SLIDING_TAPS))


def _correlate_pixels(emit: Vectors, sums, pixels: int, taps, masks: list, x_lines, x_pixel, y, y_pixel) -> None:
    """Adds some pixels of y, times those of x that each of `taps` meets; the channels behind them come into L1."""
    builder, behind = emit.builder, index(len(masks) * emit.lanes)
    for line, step in ((y, y_pixel), *((line, x_pixel) for line in x_lines)):
        for i in range(pixels):
            emit.prefetch_span(emit.at(line, builder.add(builder.mul(step, index(i)), behind)), len(masks))
    ys = [emit.load_span(emit.at(y, builder.mul(y_pixel, index(i))), masks) for i in range(pixels)]
    for line, row_sums in zip(x_lines, sums, strict=True):
        for column in range(min(taps), pixels + max(taps)):
            values, used = emit.load_span(emit.at(line, builder.mul(x_pixel, index(column))), masks), []
            for tap in taps:
                if 0 <= column - tap < pixels:
                    for value, other, register in zip(values, ys[column - tap], row_sums[tap], strict=True):
                        builder.store(emit.multiply_add(value, other, builder.load(register)), register)
                        used.append(register)
            emit.in_order(used)
