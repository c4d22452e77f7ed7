"""The three inner loops that everything on the CPU is made of, each a register tile written out in vector code.

`gemm_tile`       a tile of a matrix product, for every pointwise convolution and its gradients
`depthwise_tile`  a few pixels of a depthwise convolution, forward, and backward to the input
`correlate_tile`  one tap of a depthwise kernel's gradient

Addresses are integers and strides count elements, so one compiled function of each serves every shape and layout.
`dtype` is np.float32 or np.float64. Nothing is read or written outside the tile that the arguments describe.
"""

from __future__ import annotations

from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import Vectors, index
from .tiles import CHOSEN

GEMM_ROWS = CHOSEN.rows
CACHE_LINE = 64
SUMMED_AT_ONCE = (
    256  # products in a running sum: its rounding error grows with its length, the error of sums of sums less
)
PIXELS = CHOSEN.pixels


def vectors_of(builder, signature) -> Vectors:
    """The emitter for the dtype that is the first argument of an intrinsic."""
    return Vectors(builder, signature.args[0], CHOSEN.vector_bytes, CHOSEN.fused)


@intrinsic
def lanes(typing_context, dtype):
    """Elements of `dtype` in a vector register."""

    def codegen(context, builder, signature, arguments):
        return index(vectors_of(builder, signature).lanes)

    return types.intp(dtype), codegen


@intrinsic
def gemm_columns(typing_context, dtype):
    """Columns of `gemm_tile`; a packed kernel comes in panels of so many."""

    def codegen(context, builder, signature, arguments):
        return index(CHOSEN.vectors * vectors_of(builder, signature).lanes)

    return types.intp(dtype), codegen


@intrinsic
def gemm_tile(
    typing_context, dtype, tile_rows, rows, columns, depth,
    a, a_row, a_step, b, b_step, panel, ahead, ahead_step, start, start_row, c, c_row, past_caches, low, high,
):  # fmt: skip
    """c[i*c_row + j] = clamp(start[i*start_row + j] + sum over k < depth of a[i*a_row + k*a_step] * b[k*b_step + j])

    for i < rows, j < columns. `tile_rows` is one of GEMM_ROWS, at least `rows`; `columns` is at most `vectors*lanes`.
    All `tile_rows` rows of a and all `vectors*lanes` columns of b are read, whatever `rows` and `columns` are.
    Meanwhile b is copied into the packed `panel`, if that is not 0, and one cache line a k is asked for in L2: that
    which holds `ahead + k*ahead_step`.

    Assumes: depth >= 0; a's rows and b's columns readable to the tile's full size; c's rows at multiples of a vector
    if `past_caches` is not 0.
    """

    def codegen(context, builder, signature, arguments):
        tile_rows, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        after = builder.append_basic_block("gemm.after")
        unreachable = builder.append_basic_block("gemm.unreachable")
        choice = builder.switch(tile_rows, unreachable)
        for height in GEMM_ROWS:
            block = builder.append_basic_block(f"gemm.{height}")
            choice.add_case(index(height), block)
            builder.position_at_end(block)
            _gemm_tile(emit, height, *rest)
            builder.branch(after)
        builder.position_at_end(unreachable)
        builder.unreachable()
        builder.position_at_end(after)
        return context.get_dummy_value()

    signature = types.void(dtype, *[types.intp] * 17, dtype.instance_type, dtype.instance_type)
    return signature, codegen


def _gemm_tile(
    emit, height, rows, columns, depth, a, a_row, a_step, b, b_step, panel, ahead, ahead_step,
    start, start_row, c, c_row, past_caches, low, high,
):  # fmt: skip
    """One height of `gemm_tile`: height x vectors sums stay in registers, and go to the totals now and then."""
    builder, width = emit.builder, CHOSEN.vectors
    masks = [emit.mask(columns, j * emit.lanes) for j in range(width)]
    last = builder.sub(rows, index(1))
    totals, sums = (
        [[emit.register(f"{name}{height}_{i}_{j}") for j in range(width)] for i in range(height)]
        for name in ("total", "sum")
    )
    for i, row in enumerate(totals):
        # a row past the end starts from the last one's values: they are read, and never stored
        inside = builder.select(builder.icmp_signed("<", index(i), rows), index(i), last)
        source = emit.at(emit.pointer(start), builder.mul(inside, start_row))
        for j, register in enumerate(row):
            builder.store(emit.load(emit.at(source, index(j * emit.lanes)), masks[j]), register)
    with builder.if_then(builder.icmp_signed("==", past_caches, index(0))):
        for i in range(height):
            target = emit.at(emit.pointer(c), builder.mul(c_row, index(i)))
            for offset in range(0, width * emit.lanes * emit.itemsize, CACHE_LINE):
                emit.prefetch(emit.at(target, index(offset // emit.itemsize)), write=True)

    a_rows = [emit.at(emit.pointer(a), builder.mul(a_row, index(i))) for i in range(height)]
    chunks = builder.sdiv(builder.add(depth, index(SUMMED_AT_ONCE - 1)), index(SUMMED_AT_ONCE))
    with cgutils.for_range(builder, chunks) as chunk:
        first = builder.mul(chunk.index, index(SUMMED_AT_ONCE))
        left = builder.sub(depth, first)
        count = builder.select(builder.icmp_signed("<", left, index(SUMMED_AT_ONCE)), left, index(SUMMED_AT_ONCE))
        _for_each(emit, sums, lambda register: builder.store(emit.zero(), register))
        with cgutils.for_range(builder, count) as loop:
            k = builder.add(first, loop.index)
            b_line = emit.at(emit.pointer(b), builder.mul(k, b_step))
            b_vectors = [emit.load(emit.at(b_line, index(j * emit.lanes))) for j in range(width)]
            with builder.if_then(builder.icmp_signed("!=", panel, index(0)), likely=False):
                packed = emit.at(emit.pointer(panel), builder.mul(k, index(width * emit.lanes)))
                for j, b_vector in enumerate(b_vectors):
                    emit.store(b_vector, emit.at(packed, index(j * emit.lanes)))
            _multiply_step(emit, sums, a_rows, builder.mul(k, a_step), b_vectors)
            emit.prefetch(emit.at(emit.pointer(ahead), builder.mul(k, ahead_step)))
        for total_row, sum_row in zip(totals, sums, strict=True):
            for total, part in zip(total_row, sum_row, strict=True):
                builder.store(builder.fadd(builder.load(total), builder.load(part)), total)
    _store_tile(emit, totals, masks, rows, columns, c, c_row, past_caches, low, high)


def _for_each(emit: Vectors, tile, action) -> None:
    for row in tile:
        for register in row:
            action(register)


def _multiply_step(emit: Vectors, sums, a_rows, a_offset, b_vectors) -> None:
    """One k: a row of b, times an element of each row of a."""
    for a_row, row in zip(a_rows, sums, strict=True):
        a_value = emit.broadcast(emit.at(a_row, a_offset))
        for b_vector, register in zip(b_vectors, row, strict=True):
            emit.builder.store(emit.multiply_add(a_value, b_vector, emit.builder.load(register)), register)


def _store_tile(emit: Vectors, tile, masks, rows, columns, c, c_row, past_caches, low, high) -> None:
    """Clamps the tile and writes what of it lies inside."""
    builder, height, width = emit.builder, len(tile), CHOSEN.vectors
    low, high = emit.splat(low), emit.splat(high)
    _for_each(emit, tile, lambda register: builder.store(emit.clamp(builder.load(register), low, high), register))
    c_rows = [emit.at(emit.pointer(c), builder.mul(c_row, index(i))) for i in range(height)]
    whole = builder.and_(
        builder.icmp_signed("==", rows, index(height)), builder.icmp_signed("==", columns, index(width * emit.lanes))
    )
    with builder.if_else(whole) as (then, otherwise):
        with then, builder.if_else(builder.icmp_signed("!=", past_caches, index(0))) as (streamed, stored):
            for branch, store in ((streamed, emit.stream), (stored, emit.store)):
                with branch:
                    for target, row in zip(c_rows, tile, strict=True):
                        for j, register in enumerate(row):
                            store(builder.load(register), emit.at(target, index(j * emit.lanes)))
        with otherwise:
            for i, (target, row) in enumerate(zip(c_rows, tile, strict=True)):
                with builder.if_then(builder.icmp_signed("<", index(i), rows)):
                    for j, register in enumerate(row):
                        emit.store(builder.load(register), emit.at(target, index(j * emit.lanes)), masks[j])


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
    label = f"dw{pixels}_{span}_{'m' if mask else 'f'}"
    accumulators = [[emit.register(f"{label}_{i}_{j}") for j in range(span)] for i in range(pixels)]
    for j in range(span):
        builder.store(emit.zero(), accumulators[0][j])
    with builder.if_then(builder.icmp_signed("!=", bias, index(0))):
        source = emit.at(emit.pointer(bias), first)
        for j in range(span):
            builder.store(emit.load(emit.at(source, index(j * emit.lanes)), mask), accumulators[0][j])
    for row in accumulators[1:]:
        for j in range(span):
            builder.store(builder.load(accumulators[0][j]), row[j])

    x_first = emit.at(emit.pointer(x), first)
    kernel_first = emit.at(emit.pointer(kernel), first)
    with cgutils.for_range(builder, rows) as row_loop:
        x_line = emit.at(x_first, builder.mul(row_loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(row_loop.index, kernel_row))
        with cgutils.for_range(builder, taps) as tap_loop:
            x_taps = emit.at(x_line, builder.mul(tap_loop.index, x_tap))
            weights = emit.at(kernel_line, builder.mul(tap_loop.index, kernel_tap))
            weights = [emit.load(emit.at(weights, index(j * emit.lanes)), mask) for j in range(span)]
            for i, accumulator in enumerate(accumulators):
                source = emit.at(x_taps, builder.mul(x_pixel, index(i)))
                for j, register in enumerate(accumulator):
                    value = emit.load(emit.at(source, index(j * emit.lanes)), mask)
                    builder.store(emit.multiply_add(value, weights[j], builder.load(register)), register)

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
