"""The inner loop of a matrix product in AMX's registers: 32 rows by 32 columns, two tiles of either side.

    sums[i,j] = sum over k of a[i,k] * b[k,j]

Of the nine products of two float32, each a sum of three bfloat16, six are computed; the three left out are below
float32's own rounding: Henry, Tang and Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For
Higher-Precision Computations (2019). What is infinite makes NaN of some of them, so that what is not finite is computed
anew (see `amx_gemm`).
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .amx import ROWS, SIDE, STEP, STEP_BYTES, emit_call, pointer, terms_of
from .amx_packing import PARTS_A_STEP, emit_panel_part
from .simd import CACHE_LINE, Vectors, arithmetic_type, emit_cases, index, vectors_of

_LINE = 2 * CACHE_LINE  # bytes of a row of b: a pair for each of 32 columns; and of the sums
_SUMS, _A, _B = (0, 1, 2, 3), (4, 5), (6, 7)  # registers
# Which terms are multiplied, one of the two staying where it is: the largest products in the middle.
PRODUCTS = {1: ((0, 0),), 3: ((2, 0), (0, 0), (1, 0), (1, 1), (0, 1), (0, 2))}


@intrinsic
def amx_tile(
    typing_context, dtype, halves, depth, a, a_row, a_half, a_step, b, sums,
    source, source_row, columns, first_part, parts, panel, c, c_row, rows,
):  # fmt: skip
    """Fills `sums`, 32x32 float32: 16 rows of it for each of `halves`, 1 or 2.

    Row i of a tile of a lies at `a + i*a_row`, in bytes, the other 16 rows `a_half` on, another term STEP_BYTES on, and
    what is next in the depth `a_step` on. b is a panel.

    Meanwhile the next panel is packed, of so many columns at `source`, if that is not 0: with each product `parts` of
    its parts, from number `first_part` on. The vector units have nothing else to do; but with more than 50 instructions
    between four of AMX's those wait (Granite Rapids). The lines of so many rows of c that the sums will go to are asked
    for as well, a few at a time.

    Assumes: between `begin_tiles` and `end_tiles`.
    """

    def codegen(context, builder, signature, arguments):
        halves, *rest = arguments[1:]
        count = terms_of(signature.args[0])
        if count:
            emit = vectors_of(builder, signature)
            emit_cases(builder, halves, (1, 2), lambda number: _emit_tile(emit, count, number, *rest))
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 17), codegen


def _emit_tile(
    emit, count: int, halves: int, depth, a, a_row, a_half, a_step, b, sums,
    source, source_row, columns, first_part, parts, panel, c, c_row, rows,
) -> None:  # fmt: skip
    builder = emit.builder
    steps = builder.sdiv(builder.add(depth, index(STEP - 1)), index(STEP))
    all_parts = builder.mul(steps, index(PARTS_A_STEP))
    all_parts = builder.select(builder.icmp_signed("==", source, index(0)), index(0), all_parts)
    next_part, next_row = (cgutils.alloca_once_value(builder, value) for value in (first_part, index(0)))
    turns = builder.mul(steps, index(len(PRODUCTS[count])))
    rows_a_turn = builder.udiv(builder.add(rows, turns), builder.add(turns, index(1)))  # rounded up; there may be none
    for number in _SUMS[: 2 * halves]:
        emit_call(builder, "tilezero", number)
    with cgutils.for_range(builder, steps) as loop:
        a_at = builder.add(a, builder.mul(loop.index, a_step))
        b_at = builder.add(b, builder.mul(loop.index, index(count * STEP_BYTES)))

        def load_a(term, half):
            place = builder.add(a_at, builder.add(index(term * STEP_BYTES), builder.mul(a_half, index(half))))
            emit_call(builder, "tileloadd64", _A[half], pointer(builder, place), a_row)

        def load_b(term, half):
            place = builder.add(b_at, index(term * STEP_BYTES + half * CACHE_LINE))
            emit_call(builder, "tileloadd64", _B[half], pointer(builder, place), index(_LINE))

        def multiply(row, column):
            emit_call(builder, "tdpbf16ps", _SUMS[2 * row + column], _A[row], _B[column])

        def each_of(place, limit, number, action):
            """What `number` more of `limit` pieces of work there is."""
            done = builder.load(place)
            left = builder.sub(limit, done)
            todo = builder.select(builder.icmp_signed("<", left, number), left, number)
            with cgutils.for_range(builder, todo) as piece:
                action(builder.add(done, piece.index))
            builder.store(builder.add(done, number), place)

        def pack(part):
            emit_panel_part(emit, depth, columns, source, source_row, part, panel)

        def ask(row):
            line = emit.pointer(builder.add(c, builder.mul(row, c_row)))
            for byte in range(0, SIDE * emit.itemsize + 1, CACHE_LINE):
                emit.prefetch(emit.at(line, index(byte // emit.itemsize)), 1, write=True)

        def between():
            each_of(next_part, all_parts, parts, pack)
            each_of(next_row, rows, rows_a_turn, ask)

        _emit_step(PRODUCTS[count], halves, load_a, load_b, multiply, between)
    for number in _SUMS[: 2 * halves]:
        place = builder.add(sums, index(number // 2 * ROWS * _LINE + number % 2 * CACHE_LINE))
        emit_call(builder, "tilestored64", number, pointer(builder, place), index(_LINE))


def _emit_step(products, halves: int, load_a, load_b, multiply, between) -> None:
    """One step of the depth. What is loaded is multiplied by what stays before the next is loaded."""
    a_term = b_term = None
    for a_next, b_next in products:
        if b_next == b_term:
            for row in range(halves):
                load_a(a_next, row)
                multiply(row, 0)
                multiply(row, 1)
        else:
            for column in range(2):
                load_b(b_next, column)
                for row in range(halves):
                    if a_next != a_term and column == 0:
                        load_a(a_next, row)
                    multiply(row, column)
        a_term, b_term = a_next, b_next
        between()


def _vectors_of_sums(builder) -> Vectors:
    return Vectors(builder, types.NumberClass(types.float32), CACHE_LINE, True)


@intrinsic
def is_finite(typing_context, rows, sums):
    """Whether so many rows of `sums` hold neither an infinity nor a NaN."""

    def codegen(context, builder, signature, arguments):
        rows, sums = arguments
        emit, words = _vectors_of_sums(builder), ir.VectorType(ir.IntType(32), SIDE // 2)
        largest = cgutils.alloca_once_value(builder, ir.Constant(words, None))  # of the bits, less the sign's
        magnitude, infinite = (ir.Constant(words, [bits] * words.count) for bits in (0x7FFFFFFF, 0x7F800000))
        with cgutils.for_range(builder, rows) as loop:
            for j in range(2):
                at = builder.add(builder.mul(loop.index, index(SIDE)), index(j * emit.lanes))
                bits = builder.bitcast(emit.load(emit.at(emit.pointer(sums), at)), words)
                bits, so_far = builder.and_(bits, magnitude), builder.load(largest)
                more = builder.icmp_unsigned(">", bits, so_far)
                builder.store(builder.select(more, bits, so_far), largest)
        lanes = builder.icmp_unsigned("<", builder.load(largest), infinite)
        every = builder.bitcast(lanes, ir.IntType(words.count))
        return builder.icmp_signed("==", every, ir.Constant(every.type, -1))

    return types.boolean(types.intp, types.intp), codegen


@intrinsic
def mend(typing_context, sums, mended):
    """Takes from `mended` what of `sums` is not finite."""

    def codegen(context, builder, signature, arguments):
        sums, mended = (_vectors_of_sums(builder).pointer(address) for address in arguments)
        emit = _vectors_of_sums(builder)
        with cgutils.for_range(builder, index(SIDE * SIDE // emit.lanes)) as loop:
            at = builder.mul(loop.index, index(emit.lanes))
            value, other = emit.load(emit.at(sums, at)), emit.load(emit.at(mended, at))
            nothing = builder.fmul(value, emit.zero())
            finite = builder.fcmp_ordered("ord", nothing, nothing)
            emit.store(builder.select(finite, value, other), emit.at(sums, at))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def finish_tile(
    typing_context, dtype, rows, columns, sums, start, start_row, residual_offset, c, c_row, past_caches, low, high
):
    """c[i,j] = clamp(sums[i,j] + start[i,j] + residual[i,j]), as `gemm_tile` has it, for i < rows, j < columns.

    There is no start where that is 0.
    """

    def codegen(context, builder, signature, arguments):
        if terms_of(signature.args[0]):
            _emit_finish(vectors_of(builder, signature), _vectors_of_sums(builder), *arguments[1:])
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    return types.void(dtype, *[types.intp] * 9, bound, bound), codegen


def _emit_finish(
    emit, wide, rows, columns, sums, start, start_row, residual_offset, c, c_row, past_caches, low, high
) -> None:
    builder, vectors = emit.builder, range(SIDE // emit.lanes)
    masks = [emit.mask(columns, j * emit.lanes) for j in vectors]
    lows, highs = emit.splat(low), emit.splat(high)
    has_start, has_residual = (builder.icmp_signed("!=", each, index(0)) for each in (start, residual_offset))
    begin_moves = builder.and_(has_start, builder.icmp_signed("!=", start_row, index(0)))
    no_lane, same_begin = ir.Constant(masks[0].type, None), builder.and_(has_start, builder.not_(begin_moves))
    same = [builder.select(same_begin, mask, no_lane) for mask in masks]
    same = [emit.load(emit.at(emit.pointer(start), index(j * emit.lanes)), same[j]) for j in vectors]
    streamed = builder.icmp_signed("!=", past_caches, index(0))
    streamed = builder.and_(streamed, builder.icmp_signed("==", columns, index(SIDE)))
    totals = [wide.register(f"total{j}") for j in vectors]

    def add(condition, line):
        with builder.if_then(condition, likely=False):
            for total, added in zip(totals, emit.load_span(line, masks), strict=True):
                builder.store(builder.fadd(builder.load(total), added), total)

    with cgutils.for_range(builder, rows) as loop:
        line = wide.at(wide.pointer(sums), builder.mul(loop.index, index(SIDE)))
        for total, summed, first in zip(totals, wide.load_span(line, [None] * len(vectors)), same, strict=True):
            builder.store(builder.fadd(summed, first), total)
        target = builder.add(c, builder.mul(builder.mul(loop.index, c_row), index(emit.itemsize)))
        add(begin_moves, emit.at(emit.pointer(start), builder.mul(loop.index, start_row)))
        add(has_residual, emit.pointer(builder.add(target, residual_offset)))
        results = [emit.clamp(builder.load(total), lows, highs) for total in totals]
        places = [emit.at(emit.pointer(target), index(j * emit.lanes)) for j in vectors]
        with builder.if_else(streamed, likely=False) as (then, otherwise):
            with then:
                for result, place in zip(results, places, strict=True):
                    emit.stream(result, place)
            with otherwise:
                for result, place, mask in zip(results, places, masks, strict=True):
                    emit.store(result, place, mask)
