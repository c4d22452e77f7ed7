"""The inner loops of depthwise convolution, each a register tile written out in vector code.

`depthwise_tile`  a few pixels, forward, and backward to the input
`sliding_tile`    the same for three taps a row, a pixel apart: each input is loaded once a row, not once a tap
`correlate_tile`  one tap of a kernel's gradient
`correlate_row`   three taps of it, a pixel apart

Addresses are integers and strides count elements, so one compiled function of each serves every shape and layout.
`dtype` is np.float32 or np.float64. Nothing is read or written outside the tile that the arguments describe.
"""

from __future__ import annotations

from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import CACHE_LINE, Vectors, emit_cases, index, vectors_of
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
    typing_context, dtype, pixels, channels, rows, taps, x, x_row, x_tap, x_pixel, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, low, high,
):  # fmt: skip
    """y[i*y_pixel + c] = clamp(bias[c] + sum over r < rows, s < taps of
                            x[r*x_row + s*x_tap + i*x_pixel + c] * kernel[r*kernel_row + s*kernel_tap + c])

    for i < pixels, c < channels. `pixels` is PIXELS or 1; bias is an address of `channels` values, or 0.

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

    signature = types.void(dtype, *[types.intp] * 14, dtype.instance_type, dtype.instance_type)
    return signature, codegen


def _depthwise_block(
    emit, pixels, first, span, mask, rows, taps, x, x_row, x_tap, x_pixel, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, low, high,
):  # fmt: skip
    """`pixels` pixels x `span` channel vectors from channel `first` on, accumulated in registers over all taps."""
    builder = emit.builder
    accumulators = _accumulators(emit, "dw", pixels, first, span, mask, bias)
    x_first = emit.at(emit.pointer(x), first)
    kernel_first = emit.at(emit.pointer(kernel), first)
    with cgutils.for_range(builder, rows) as row_loop:
        x_line = emit.at(x_first, builder.mul(row_loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(row_loop.index, kernel_row))
        with cgutils.for_range(builder, taps) as tap_loop:
            x_taps = emit.at(x_line, builder.mul(tap_loop.index, x_tap))
            weights = emit.load_span(emit.at(kernel_line, builder.mul(tap_loop.index, kernel_tap)), span, mask)
            for i, accumulator in enumerate(accumulators):
                source = emit.at(x_taps, builder.mul(x_pixel, index(i)))
                for j, register in enumerate(accumulator):
                    value = emit.load(emit.at(source, index(j * emit.lanes)), mask)
                    builder.store(emit.multiply_add(value, weights[j], builder.load(register)), register)
    _store_pixels(emit, accumulators, first, mask, y, y_pixel, low, high)


@intrinsic
def sliding_tile(
    typing_context, dtype, pixels, channels, rows, x, x_row, x_pixel, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, low, high,
):  # fmt: skip
    """`depthwise_tile` for SLIDING_TAPS taps with x_tap == x_pixel. `pixels` is one of SLIDES."""

    def codegen(context, builder, signature, arguments):
        pixels, channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)

        def tile(count):
            def block(first, span, mask):
                _sliding_block(emit, count, first, span, mask, *rest)

            _over_channels(emit, channels, CHOSEN.slide_span, block)

        emit_cases(builder, pixels, SLIDES, tile)
        return context.get_dummy_value()

    signature = types.void(dtype, *[types.intp] * 12, dtype.instance_type, dtype.instance_type)
    return signature, codegen


def _sliding_block(
    emit, pixels, first, span, mask, rows, x, x_row, x_pixel, kernel, kernel_row, kernel_tap,
    bias, y, y_pixel, low, high,
):  # fmt: skip
    """`pixels` pixels x `span` channel vectors; the pixels that the next tile is the first to read come into L1."""
    builder = emit.builder
    accumulators = _accumulators(emit, "slide", pixels, first, span, mask, bias)
    x_first, kernel_first = emit.at(emit.pointer(x), first), emit.at(emit.pointer(kernel), first)
    with cgutils.for_range(builder, rows) as loop:
        x_line = emit.at(x_first, builder.mul(loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(loop.index, kernel_row))
        weights = [
            emit.load_span(emit.at(kernel_line, builder.mul(kernel_tap, index(tap))), span, mask)
            for tap in range(SLIDING_TAPS)
        ]
        for column in range(pixels + SLIDING_TAPS - 1):
            values = emit.load_span(emit.at(x_line, builder.mul(x_pixel, index(column))), span, mask)
            for tap in range(SLIDING_TAPS):
                if 0 <= column - tap < pixels:
                    for value, weight, register in zip(values, weights[tap], accumulators[column - tap], strict=True):
                        builder.store(emit.multiply_add(value, weight, builder.load(register)), register)
    last_line = emit.at(x_first, builder.mul(builder.sub(rows, index(1)), x_row))
    for column in range(pixels + SLIDING_TAPS - 1, 2 * pixels + SLIDING_TAPS - 1):
        ahead = emit.at(last_line, builder.mul(x_pixel, index(column)))
        for offset in range(0, span * emit.lanes * emit.itemsize, CACHE_LINE):
            emit.prefetch(emit.at(ahead, index(offset // emit.itemsize)), level=1)
    _store_pixels(emit, accumulators, first, mask, y, y_pixel, low, high)


def _accumulators(emit: Vectors, name: str, pixels: int, first, span: int, mask, bias) -> list:
    """Registers for pixels x span vectors that hold the bias, or zero where its address is 0."""
    builder = emit.builder
    label = f"{name}{pixels}_{span}_{'m' if mask else 'f'}"
    accumulators = [[emit.register(f"{label}_{i}_{j}") for j in range(span)] for i in range(pixels)]
    for j in range(span):
        builder.store(emit.zero(), accumulators[0][j])
    with builder.if_then(builder.icmp_signed("!=", bias, index(0))):
        for j, value in enumerate(emit.load_span(emit.at(emit.pointer(bias), first), span, mask)):
            builder.store(value, accumulators[0][j])
    for row in accumulators[1:]:
        for j in range(span):
            builder.store(builder.load(accumulators[0][j]), row[j])
    return accumulators


def _store_pixels(emit: Vectors, accumulators, first, mask, y, y_pixel, low, high) -> None:
    """Clamps the accumulators and writes them, a pixel each `y_pixel` elements."""
    builder = emit.builder
    low, high = emit.splat(low), emit.splat(high)
    y_first = emit.at(emit.pointer(y), first)
    for i, accumulator in enumerate(accumulators):
        target = emit.at(y_first, builder.mul(y_pixel, index(i)))
        for j, register in enumerate(accumulator):
            value = emit.clamp(builder.load(register), low, high)
            emit.store(value, emit.at(target, index(j * emit.lanes)), mask)


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
def correlate_row(
    typing_context, dtype, channels, images, rows, columns, x, x_image, x_row, x_pixel, y, y_image, y_row, y_pixel,
    out, out_tap,
):  # fmt: skip
    """out[s*out_tap + c] += sum over n < images, p < rows, q < columns of
    x[n*x_image + p*x_row + (q+s)*x_pixel + c] * y[n*y_image + p*y_row + q*y_pixel + c]

    for s < SLIDING_TAPS, c < channels: `correlate_tile` for the taps of a row, with each x loaded once for all."""

    def codegen(context, builder, signature, arguments):
        channels, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        _over_channels(
            emit, channels, CHOSEN.slide_span, lambda first, span, mask: _correlate_taps(emit, first, span, mask, *rest)
        )
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 14), codegen


def _correlate_taps(
    emit, first, span, mask, images, rows, columns, x, x_image, x_row, x_pixel, y, y_image, y_row, y_pixel, out, out_tap
):
    """SLIDING_TAPS x `span` sums in registers, over every pixel: several pixels at once, then one at a time."""
    builder = emit.builder
    sums = [
        [emit.register(f"taps{span}_{'m' if mask else 'f'}_{tap}_{j}") for j in range(span)]
        for tap in range(SLIDING_TAPS)
    ]
    targets = [emit.at(emit.at(emit.pointer(out), first), builder.mul(out_tap, index(t))) for t in range(SLIDING_TAPS)]
    for target, registers in zip(targets, sums, strict=True):
        for value, register in zip(emit.load_span(target, span, mask), registers, strict=True):
            builder.store(value, register)
    x_first, y_first = emit.at(emit.pointer(x), first), emit.at(emit.pointer(y), first)
    several = builder.sdiv(columns, index(PIXELS))
    with cgutils.for_range(builder, images) as image, cgutils.for_range(builder, rows) as row:
        x_line = emit.at(emit.at(x_first, builder.mul(image.index, x_image)), builder.mul(row.index, x_row))
        y_line = emit.at(emit.at(y_first, builder.mul(image.index, y_image)), builder.mul(row.index, y_row))
        for begin, blocks, pixels in (
            (index(0), several, PIXELS),
            (builder.mul(several, index(PIXELS)), builder.srem(columns, index(PIXELS)), 1),
        ):
            with cgutils.for_range(builder, blocks) as block:
                pixel = builder.add(begin, builder.mul(block.index, index(pixels)))
                _correlate_pixels(
                    emit, sums, pixels, mask,
                    emit.at(x_line, builder.mul(pixel, x_pixel)), x_pixel,
                    emit.at(y_line, builder.mul(pixel, y_pixel)), y_pixel,
                )  # fmt: skip
    for target, registers in zip(targets, sums, strict=True):
        for j, register in enumerate(registers):
            emit.store(builder.load(register), emit.at(target, index(j * emit.lanes)), mask)


def _correlate_pixels(emit: Vectors, sums, pixels: int, mask, x, x_pixel, y, y_pixel) -> None:
    """Adds some pixels of y, times those of x that each tap meets."""
    builder, span = emit.builder, len(sums[0])
    ys = [emit.load_span(emit.at(y, builder.mul(y_pixel, index(i))), span, mask) for i in range(pixels)]
    for column in range(pixels + SLIDING_TAPS - 1):
        values = emit.load_span(emit.at(x, builder.mul(x_pixel, index(column))), span, mask)
        for tap, registers in enumerate(sums):
            if 0 <= column - tap < pixels:
                for value, other, register in zip(values, ys[column - tap], registers, strict=True):
                    builder.store(emit.multiply_add(value, other, builder.load(register)), register)
