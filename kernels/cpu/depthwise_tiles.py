"""The inner loops of depthwise convolution, forward and to its input backward: register tiles, written as vector code.

`depthwise_tile`  a few pixels, forward, and backward to the input
`sliding_tile`    the same for taps as far apart as the pixels: each input is loaded once a row, not once a tap

Addresses are integers and strides count elements, so one compiled function of each serves every shape and layout.
`dtype` is np.float32 or np.float64, of the first two also BFLOAT16. Nothing is read or written outside the tile that
the arguments describe.
"""

from __future__ import annotations

import functools

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import Vectors, arithmetic_type, emit_cases, index, vectors_of
from .tiles import CHOSEN

PIXELS = CHOSEN.pixels
SLIDES = CHOSEN.slides
SLIDING_TAPS = 3
WIDE_SLIDING_TAPS = (5, 7)


def over_channels(emit: Vectors, channels, span: int, body) -> None:
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
    are written past the caches if `past_caches` is not 0 (but bfloat16's): then y's pixels lie at multiples of one.

    Strides are free (negative too), which is how one loop serves any stride and dilation, forward and backward.
    """

    def codegen(context, builder, signature, arguments):
        pixels, channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        with builder.if_else(builder.icmp_signed("==", pixels, index(PIXELS))) as (then, otherwise):
            for branch, count in ((then, PIXELS), (otherwise, 1)):
                with branch:
                    over_channels(
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


def _sliding_tile_of(widths: tuple[int, ...]):
    """The sliding tile for `widths` taps a row. One for all would be a function that no compiler sees through."""

    @intrinsic
    def sliding_tile(
        typing_context, dtype, taps, pixels, column_first, column_last, channels, rows, x, x_row, x_pixel, x_low,
        kernel, kernel_row, kernel_tap, bias, y, y_pixel, past_caches, low, high,
    ):  # fmt: skip
        """`depthwise_tile` with x_tap == x_pixel, for `taps` of `widths` and `pixels` of SLIDES.

        x is where the first tap of the first pixel would read. Of the pixels + taps - 1 columns from there on only
        column_first..column_last are inside the image, among them each pixel's middle tap; the others are left out.
        """

        def codegen(context, builder, signature, arguments):
            taps, pixels, column_first, column_last, channels, *rest = arguments[1:]
            emit = vectors_of(builder, signature)

            def emit_case(width, count):
                span = sliding_span(width, count)
                step = index(span * emit.lanes)
                blocks, left = builder.sdiv(channels, step), builder.srem(channels, step)
                tile = functools.partial(_sliding, emit, width, count, (column_first, column_last))
                with cgutils.for_range(builder, blocks) as block:
                    tile(builder.mul(block.index, step), [None] * span, *rest)
                with builder.if_then(builder.icmp_signed(">", left, index(0)), likely=False):
                    masks = [emit.mask(left, j * emit.lanes) for j in range(span)]
                    tile(builder.mul(blocks, step), masks, *rest)

            emit_cases(
                builder, taps, widths,
                lambda width: emit_cases(builder, pixels, SLIDES, lambda count: emit_case(width, count)),
            )  # fmt: skip
            return context.get_dummy_value()

        bound = arithmetic_type(dtype)
        signature = types.void(dtype, *[types.intp] * 9, bound, *[types.intp] * 7, bound, bound)
        return signature, codegen

    return sliding_tile


def _fits(taps: int, pixels: int, span: int) -> bool:
    """Whether the registers hold the sums, a row's weights, an input and the bound of inputs."""
    return (pixels + taps + 1) * span + 1 <= CHOSEN.registers


def sliding_span(taps: int, pixels: int) -> int:
    """Channel vectors at once of a sliding tile."""
    return CHOSEN.slide_span if _fits(taps, pixels, CHOSEN.slide_span) else 1


def _sliding(
    emit, taps, pixels, columns_inside, first, masks, rows, x, x_row, x_pixel, x_low, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, past_caches, low, high,
):  # fmt: skip
    """`pixels` pixels x `masks` channel vectors from channel `first` on.

    What the next tile is the first to read or write comes into L1. Each row asks for a part: all lines at once would
    fill the queue of what the core waits for, and the next tile's first loads would wait behind them.
    """
    builder, columns = emit.builder, pixels + taps - 1
    accumulators = _accumulators(emit, f"slide{taps}", pixels, first, masks, bias)
    x_first, kernel_first = emit.at(emit.pointer(x), first), emit.at(emit.pointer(kernel), first)
    x_lows = emit.splat(x_low)
    last_line, y_first = (
        emit.at(x_first, builder.mul(builder.sub(rows, index(1)), x_row)),
        emit.at(emit.pointer(y), first),
    )
    streams = builder.and_(builder.icmp_signed("!=", past_caches, index(0)), _may_stream(emit))
    stack = builder.bitcast(emit.register("asked_instead"), y_first.type)  # where y streams: this line is there
    y_asked, y_step = builder.select(streams, stack, y_first), builder.select(streams, index(0), y_pixel)
    column_first, column_last = columns_inside
    inside = {
        column: builder.icmp_signed("<=", column_first, index(column))
        if column < taps // 2
        else builder.icmp_signed("<", index(column), column_last)
        for column in range(columns)
        if column < taps // 2 or column >= columns - taps // 2
    }
    asked = -(-pixels // taps)  # pixels a row: all of them, where rows are as many as taps
    with cgutils.for_range(builder, rows) as loop:
        for i in range(asked):
            pixel = builder.add(builder.mul(loop.index, index(asked)), index(i))
            column, behind = (builder.add(pixel, index(step)) for step in (columns, pixels))
            emit.prefetch_span(emit.at(last_line, builder.mul(x_pixel, column)), len(masks))
            emit.prefetch_span(emit.at(y_asked, builder.mul(y_step, behind)), len(masks), write=True)
        x_line = emit.at(x_first, builder.mul(loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(loop.index, kernel_row))

        def weights_of(tap, kernel_line=kernel_line):
            return emit.load_span(emit.at(kernel_line, builder.mul(kernel_tap, index(tap))), masks)

        held = [weights_of(tap) for tap in range(taps)] if _fits(taps, pixels, len(masks)) else None

        def add_column(column, x_line=x_line, held=held, weights_of=weights_of):
            values = emit.load_span(emit.at(x_line, builder.mul(x_pixel, index(column))), masks)
            values, used = [emit.at_least(x_lows, value) for value in values], []
            for tap in range(max(0, column - pixels + 1), min(taps, column + 1)):
                weights = held[tap] if held else weights_of(tap)
                for value, weight, register in zip(values, weights, accumulators[column - tap], strict=True):
                    builder.store(emit.multiply_add(value, weight, builder.load(register)), register)
                    used.append(register)
            emit.in_order(used)

        for column in range(columns):
            if column in inside:
                with builder.if_then(inside[column]):
                    add_column(column)
            else:
                add_column(column)
    _store_pixels(emit, accumulators, first, masks, y, y_pixel, past_caches, low, high)


sliding_tile = _sliding_tile_of((SLIDING_TAPS,))
wide_sliding_tile = _sliding_tile_of(WIDE_SLIDING_TAPS)


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


def _may_stream(emit: Vectors):
    """Whether y's vectors may be written past the caches: not those of bfloat16, half as wide as a cache line."""
    return ir.Constant(ir.IntType(1), int(emit.factors == 1))


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

    if masks[0] is not None:
        store(emit.store)
        return
    streams = builder.and_(builder.icmp_signed("!=", past_caches, index(0)), _may_stream(emit))
    with builder.if_else(streams, likely=False) as (streamed, stored):
        with streamed:
            store(lambda value, target, mask: emit.stream(value, target))
        with stored:
            store(emit.store)
