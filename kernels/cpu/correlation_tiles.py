"""The inner loops of the gradient of a depthwise kernel, each a register tile written out in vector code.

`correlate_tile`  one tap
`correlate_rows`  three taps of a row, a pixel apart, or the nine of three rows

As those of `depthwise_tiles`: addresses are integers, strides count elements, and nothing is read or written outside
the tile that the arguments describe.
"""

from __future__ import annotations

from numba.core import cgutils, types
from numba.extending import intrinsic

from .depthwise_tiles import PIXELS, over_channels
from .simd import Vectors, emit_cases, index, vectors_of
from .tiles import CHOSEN

CORRELATED_TAPS = 3


@intrinsic
def correlate_tile(
    typing_context, dtype, channels, images, rows, columns, x, x_image, x_row, x_pixel, y, y_image, y_row, y_pixel, out,
):  # fmt: skip
    """out[c] += sum over n < images, p < rows, q < columns of
    x[n*x_image + p*x_row + q*x_pixel + c] * y[n*y_image + p*y_row + q*y_pixel + c]     for c < channels."""

    def codegen(context, builder, signature, arguments):
        channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        over_channels(
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

    for r < kernel_rows, s < CORRELATED_TAPS, c < channels: `correlate_tile` for all taps, with each y loaded once for
    all and each x once for those of its row. `kernel_rows` is 1 or CORRELATED_TAPS. Where `cut_left` is not 0, the
    first column's first tap is left out, where `cut_right` the last one's last.
    """

    def codegen(context, builder, signature, arguments):
        cut_left, cut_right, kernel_rows, channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        cuts = [builder.icmp_signed("!=", cut, index(0)) for cut in (cut_left, cut_right)]
        emit_cases(
            builder, kernel_rows, (1, CORRELATED_TAPS),
            lambda height: over_channels(
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
    """height x CORRELATED_TAPS x `masks` sums in registers, over every pixel."""
    builder = emit.builder
    label = f"taps{height}_{len(masks)}_{'m' if masks[0] else 'f'}"
    sums, targets = [], []
    for r in range(height):
        sums.append(
            [[emit.register(f"{label}_{r}_{s}_{j}") for j in range(len(masks))] for s in range(CORRELATED_TAPS)]
        )
        line = emit.at(emit.at(emit.pointer(out), first), builder.mul(out_row, index(r)))
        targets.append([emit.at(line, builder.mul(out_tap, index(s))) for s in range(CORRELATED_TAPS)])
    taps = [(sums[r][s], targets[r][s]) for r in range(height) for s in range(CORRELATED_TAPS)]
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
            pixels(builder.add(start, builder.mul(block.index, index(count))), count, range(CORRELATED_TAPS))


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
