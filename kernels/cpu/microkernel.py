"""The inner loops that everything on the CPU is made of, each a register tile written out in vector code.

`gemm_tile`       a tile of a matrix product, for every pointwise convolution and its gradients
`depthwise_tile`  a few pixels of a depthwise convolution, forward, and backward to the input
`sliding_tile`    the same for three taps a row, a pixel apart: each input is loaded once a row, not once a tap
`correlate_tile`  one tap of a depthwise kernel's gradient
`correlate_row`   three taps of it, a pixel apart

Addresses are integers and strides count elements, so one compiled function of each serves every shape and layout.
`dtype` is np.float32 or np.float64. Nothing is read or written outside the tile that the arguments describe.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import Vectors, index
from .tiles import CHOSEN

GEMM_ROWS = CHOSEN.rows
CACHE_LINE = 64
L1_PERIOD = 4096  # bytes: addresses so far apart share one set of L1, whose sets are counted within a page
SUMMED_AT_ONCE = (
    256  # products in a running sum: its rounding error grows with its length, the error of sums of sums less
)
PIXELS = CHOSEN.pixels
SLIDES = CHOSEN.slides
SLIDING_TAPS = 3
ROWS_A_POINTER = 3
EARLY = 24  # rows of b from being asked for to being read, where it is not packed: memory answers within so many


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
    sums = [[emit.register(f"sum{height}_{i}_{j}") for j in range(width)] for i in range(height)]
    _for_each(emit, sums, lambda register: builder.store(emit.zero(), register))
    _prefetch_tile(emit, height, c, c_row, past_caches)
    a_rows = _row_pointers(emit, a, a_row, height)
    totals = _Totals(emit, sums)
    chunks = builder.sdiv(builder.add(depth, index(SUMMED_AT_ONCE - 1)), index(SUMMED_AT_ONCE))
    with cgutils.for_range(builder, chunks) as chunk:
        totals.take_sums(chunk.index)
        first = builder.mul(chunk.index, index(SUMMED_AT_ONCE))
        left = builder.sub(depth, first)
        count = builder.select(builder.icmp_signed("<", left, index(SUMMED_AT_ONCE)), left, index(SUMMED_AT_ONCE))
        with cgutils.for_range(builder, count) as loop:
            k = builder.add(first, loop.index)
            b_line = emit.at(emit.pointer(b), builder.mul(k, b_step))
            b_vectors = _load_span(emit, b_line, width, None)
            with builder.if_then(builder.icmp_signed("!=", panel, index(0)), likely=False):
                packed = emit.at(emit.pointer(panel), builder.mul(k, index(width * emit.lanes)))
                for j, b_vector in enumerate(b_vectors):
                    emit.store(b_vector, emit.at(packed, index(j * emit.lanes)))
                early = emit.at(b_line, builder.mul(b_step, index(EARLY)))
                for offset in range(0, width * emit.lanes * emit.itemsize, CACHE_LINE):
                    emit.prefetch(emit.at(early, index(offset // emit.itemsize)))
            _multiply_step(emit, sums, a_rows, a_row, a_step, b_vectors)
            emit.prefetch(emit.at(emit.pointer(ahead), builder.mul(k, ahead_step)))
    totals.add_to_sums(chunks)
    for i, row in enumerate(sums):
        # a row past the end gets the last one's values: they are read, and never stored
        inside = builder.select(builder.icmp_signed("<", index(i), rows), index(i), last)
        line = emit.at(emit.pointer(start), builder.mul(inside, start_row))
        for j, register in enumerate(row):
            value = emit.load(emit.at(line, index(j * emit.lanes)), masks[j])
            builder.store(builder.fadd(builder.load(register), value), register)
    _store_tile(emit, sums, masks, rows, columns, c, c_row, past_caches, low, high)


class _Totals:
    """What a tile's sums add up to, chunk by chunk. It lies in memory: the sums have all the registers."""

    def __init__(self, emit: Vectors, sums: list) -> None:
        self.emit, self.sums = emit, [register for row in sums for register in row]
        memory = cgutils.alloca_once(emit.builder, emit.type, size=index(len(self.sums)))
        self.memory = _opaque(emit.builder, memory)  # or the compiler would move it to registers, and the sums out

    def _update(self, sums_after) -> None:
        for number, register in enumerate(self.sums):
            sums_after(register, self.emit.builder.gep(self.memory, [index(number)]))

    def take_sums(self, chunk) -> None:
        """Before a chunk: nothing for the first; then the sums so far become, or are added to, the totals."""
        builder = self.emit.builder

        def begin(register, total):
            builder.store(builder.load(register), total)

        def add(register, total):
            builder.store(builder.fadd(builder.load(total), builder.load(register)), total)

        with builder.if_then(builder.icmp_signed(">", chunk, index(0)), likely=False):
            with builder.if_else(builder.icmp_signed("==", chunk, index(1))) as (then, otherwise):
                with then:
                    self._update(begin)
                with otherwise:
                    self._update(add)
            self._update(lambda register, total: builder.store(self.emit.zero(), register))

    def add_to_sums(self, chunks) -> None:
        """After the last chunk: the sums of all."""
        builder = self.emit.builder

        def add(register, total):
            builder.store(builder.fadd(builder.load(total), builder.load(register)), register)

        with builder.if_then(builder.icmp_signed(">", chunks, index(1))):
            self._update(add)


def _prefetch_tile(emit: Vectors, height: int, c, c_row, past_caches) -> None:
    """Ask for the lines of c, so that they have come when they are written.

    Not for rows that collide in L1 (see `rows_collide`): they would drive each other out, and a's rows too.
    """
    builder, row_bytes = emit.builder, CHOSEN.vectors * emit.lanes * emit.itemsize
    apart = builder.and_(builder.mul(c_row, index(emit.itemsize)), index(L1_PERIOD // 2 - 1))
    wanted = builder.and_(builder.icmp_signed("!=", apart, index(0)), builder.icmp_signed("==", past_caches, index(0)))
    with builder.if_then(wanted):
        for i in range(height):
            row = emit.at(emit.pointer(c), builder.mul(c_row, index(i)))
            for offset in range(0, row_bytes, CACHE_LINE):
                emit.prefetch(emit.at(row, index(offset // emit.itemsize)), level=1, write=True)


def _for_each(emit: Vectors, tile, action) -> None:
    for row in tile:
        for register in row:
            action(register)


def _row_pointers(emit: Vectors, a, a_row, height: int) -> list:
    """A pointer to every third row of a, in a slot of its own.

    From each the two rows after it are reached by the addressing modes of x86. Left to itself the compiler goes from
    row to row by additions that wait for each other, and take turns with the arithmetic. So it is not told that one
    pointer follows from another.
    """
    builder, slots = emit.builder, []
    for first in range(0, height, ROWS_A_POINTER):
        pointer = emit.at(emit.pointer(a), builder.mul(a_row, index(first)))
        slots.append(cgutils.alloca_once_value(builder, _opaque(builder, pointer)))
    return slots


def _opaque(builder, value):
    """The same value, of which the compiler no longer knows where it comes from."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)


def _multiply_step(emit: Vectors, sums, a_rows, a_row, a_step, b_vectors) -> None:
    """One k: a row of b, times an element of each row of a, whose pointers then go on to the next."""
    builder = emit.builder
    for i, row in enumerate(sums):
        pointer = builder.load(a_rows[i // ROWS_A_POINTER])
        a_value = emit.broadcast(emit.at(pointer, builder.mul(a_row, index(i % ROWS_A_POINTER))))
        for b_vector, register in zip(b_vectors, row, strict=True):
            builder.store(emit.multiply_add(a_value, b_vector, builder.load(register)), register)
    for slot in a_rows:
        builder.store(_opaque(builder, emit.at(builder.load(slot), a_step)), slot)


def _store_tile(emit: Vectors, tile, masks, rows, columns, c, c_row, past_caches, low, high) -> None:
    """Clamps the tile and writes what of it lies inside."""
    builder, height, width = emit.builder, len(tile), CHOSEN.vectors
    with builder.if_then(emit.bounded(low, high)):
        lows, highs = emit.splat(low), emit.splat(high)
        _for_each(emit, tile, lambda register: builder.store(emit.clamp(builder.load(register), lows, highs), register))
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
    accumulators = _accumulators(emit, "dw", pixels, first, span, mask, bias)
    x_first = emit.at(emit.pointer(x), first)
    kernel_first = emit.at(emit.pointer(kernel), first)
    with cgutils.for_range(builder, rows) as row_loop:
        x_line = emit.at(x_first, builder.mul(row_loop.index, x_row))
        kernel_line = emit.at(kernel_first, builder.mul(row_loop.index, kernel_row))
        with cgutils.for_range(builder, taps) as tap_loop:
            x_taps = emit.at(x_line, builder.mul(tap_loop.index, x_tap))
            weights = _load_span(emit, emit.at(kernel_line, builder.mul(tap_loop.index, kernel_tap)), span, mask)
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
        after = builder.append_basic_block("slide.after")
        unreachable = builder.append_basic_block("slide.unreachable")
        choice = builder.switch(pixels, unreachable)
        for count in SLIDES:
            block = builder.append_basic_block(f"slide.{count}")
            choice.add_case(index(count), block)
            builder.position_at_end(block)
            _over_channels(
                emit,
                channels,
                CHOSEN.slide_span,
                lambda first, span, mask, count=count: _sliding_block(emit, count, first, span, mask, *rest),
            )
            builder.branch(after)
        builder.position_at_end(unreachable)
        builder.unreachable()
        builder.position_at_end(after)
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
            _load_span(emit, emit.at(kernel_line, builder.mul(kernel_tap, index(tap))), span, mask)
            for tap in range(SLIDING_TAPS)
        ]
        for column in range(pixels + SLIDING_TAPS - 1):
            values = _load_span(emit, emit.at(x_line, builder.mul(x_pixel, index(column))), span, mask)
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


def _load_span(emit: Vectors, pointer, span: int, mask) -> list:
    return [emit.load(emit.at(pointer, index(j * emit.lanes)), mask) for j in range(span)]


def _accumulators(emit: Vectors, name: str, pixels: int, first, span: int, mask, bias) -> list:
    """Registers for pixels x span vectors that hold the bias, or zero where its address is 0."""
    builder = emit.builder
    label = f"{name}{pixels}_{span}_{'m' if mask else 'f'}"
    accumulators = [[emit.register(f"{label}_{i}_{j}") for j in range(span)] for i in range(pixels)]
    for j in range(span):
        builder.store(emit.zero(), accumulators[0][j])
    with builder.if_then(builder.icmp_signed("!=", bias, index(0))):
        for j, value in enumerate(_load_span(emit, emit.at(emit.pointer(bias), first), span, mask)):
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
        for value, register in zip(_load_span(emit, target, span, mask), registers, strict=True):
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
    ys = [_load_span(emit, emit.at(y, builder.mul(y_pixel, index(i))), span, mask) for i in range(pixels)]
    for column in range(pixels + SLIDING_TAPS - 1):
        values = _load_span(emit, emit.at(x, builder.mul(x_pixel, index(column))), span, mask)
        for tap, registers in enumerate(sums):
            if 0 <= column - tap < pixels:
                for value, other, register in zip(values, ys[column - tap], registers, strict=True):
                    builder.store(emit.multiply_add(value, other, builder.load(register)), register)
