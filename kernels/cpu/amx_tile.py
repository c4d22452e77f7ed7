"""The inner loop of a matrix product in AMX's registers: 32 rows by 32 columns, two tiles of either side.

    sums[i,j] = sum over k of a[i,k] * b[k,j]

A register holds 16 rows of 64 bytes, and the one instruction that there is multiplies pairs of bfloat16, which it sums
in float32. A float32 goes in as the sum of three bfloat16 that it is, `high + middle + low`: of the nine products of
two such sums six are computed, and the three left out are below float32's own rounding. An infinity or a NaN makes NaN
of all that it meets, so what is not finite is computed anew elsewhere (see `amx_gemm`).

a comes as 16 rows of 32 elements for a tile, b as 16 rows of 32 columns, a pair of k in each. Intel's manual, volume 1,
chapter 18, tells of the registers; the sum of three is that of Henry, Tang and Heinecke, Leveraging the bfloat16
Artificial Intelligence Datatype For Higher-Precision Computations (2019).
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import CACHE_LINE, Vectors, arithmetic_type, emit_cases, index, vectors_of
from .tiles import CHOSEN

SIDE = 32  # rows and columns of the product: two tiles
STEP = 32  # elements of the depth that a tile holds
_TILE_ROWS, _TILE_BYTES = 16, 1024
_LINE = 2 * CACHE_LINE  # bytes of a row of b: a pair for each of 32 columns
STEP_BYTES = 2 * _TILE_BYTES  # of either side, for each of its terms
_SUMS, _A, _B = (0, 1, 2, 3), (4, 5), (6, 7)  # registers
# Which terms are multiplied, one of the two staying where it is: the largest products in the middle.
_PRODUCTS = {1: ((0, 0),), 3: ((2, 0), (0, 0), (1, 0), (1, 1), (0, 1), (0, 2))}
_BYTE, _WORD = ir.IntType(8), ir.IntType(16)


def _terms(dtype: types.NumberClass) -> int:
    kinds = {types.float32: 3, types.uint16: 1}
    return kinds.get(dtype.instance_type, 0) if CHOSEN.matrices else 0


@intrinsic
def terms(typing_context, dtype):
    """How many bfloat16 stand for an element of `dtype` in AMX's registers; 0 where they are not used for it."""

    def codegen(context, builder, signature, arguments):
        return index(_terms(signature.args[0]))

    return types.intp(dtype), codegen


@intrinsic
def begin_tiles(typing_context, dtype):
    """Sets this thread's registers up, all eight alike, and clears them."""

    def codegen(context, builder, signature, arguments):
        if _terms(signature.args[0]):
            palette, columns, rows = [1] + [0] * 15, [CACHE_LINE, 0] * 8 + [0] * 16, [_TILE_ROWS] * 8 + [0] * 8
            kind = ir.ArrayType(_BYTE, CACHE_LINE)
            layout = ir.Constant(kind, bytearray(palette + columns + rows))
            place = cgutils.global_constant(builder, "amx_layout", layout)
            _call(builder, "ldtilecfg", builder.bitcast(place, _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(dtype), codegen


@intrinsic
def end_tiles(typing_context, dtype):
    """Gives the registers back: the system need not save them any more."""

    def codegen(context, builder, signature, arguments):
        if _terms(signature.args[0]):
            _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(dtype), codegen


@intrinsic
def amx_tile(typing_context, dtype, halves, steps, a, a_row, a_half, a_step, b, ahead, ahead_lines, sums):
    """Fills `sums`, 32x32 float32: 16 rows of it for each of `halves`, 1 or 2.

    Row i of a tile of a lies at `a + i*a_row`, in bytes; the other 16 rows `a_half` on, another term 2 KiB on, what is
    next in the depth `a_step` on. b is a panel. Meanwhile each step asks for `ahead_lines` cache lines from `ahead` on.

    Assumes: between `begin_tiles` and `end_tiles`.
    """

    def codegen(context, builder, signature, arguments):
        halves, *rest = arguments[1:]
        count = _terms(signature.args[0])
        if count:
            emit = vectors_of(builder, signature)
            emit_cases(builder, halves, (1, 2), lambda number: _emit_tile(emit, count, number, *rest))
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 10), codegen


def _call(builder, name: str, *arguments) -> None:
    function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), arguments)


def _register(number: int) -> ir.Constant:
    return ir.Constant(_BYTE, number)


def _emit_tile(emit, count: int, halves: int, steps, a, a_row, a_half, a_step, b, ahead, ahead_lines, sums) -> None:
    builder = emit.builder

    def at(address):
        return builder.inttoptr(address, _BYTE.as_pointer())

    for number in _SUMS[: 2 * halves]:
        _call(builder, "tilezero", _register(number))
    with cgutils.for_range(builder, steps) as loop:
        a_at = builder.add(a, builder.mul(loop.index, a_step))
        b_at = builder.add(b, builder.mul(loop.index, index(count * STEP_BYTES)))

        def load_a(term, half):
            place = builder.add(a_at, builder.add(index(term * STEP_BYTES), builder.mul(a_half, index(half))))
            _call(builder, "tileloadd64", _register(_A[half]), at(place), a_row)

        def load_b(term, half):
            place = builder.add(b_at, index(term * STEP_BYTES + half * CACHE_LINE))
            _call(builder, "tileloadd64", _register(_B[half]), at(place), index(_LINE))

        def multiply(row, column):
            _call(builder, "tdpbf16ps", *map(_register, (_SUMS[2 * row + column], _A[row], _B[column])))

        _emit_step(_PRODUCTS[count], halves, load_a, load_b, multiply)
        line = builder.add(ahead, builder.mul(builder.mul(loop.index, ahead_lines), index(CACHE_LINE)))
        with cgutils.for_range(builder, ahead_lines) as asks:
            emit.prefetch(emit.pointer(builder.add(line, builder.mul(asks.index, index(CACHE_LINE)))))
    for number in _SUMS[: 2 * halves]:
        place = index(number // 2 * 2 * _TILE_ROWS * CACHE_LINE + number % 2 * CACHE_LINE)
        _call(builder, "tilestored64", _register(number), at(builder.add(sums, place)), index(_LINE))


def _emit_step(products, halves: int, load_a, load_b, multiply) -> None:
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


def _vectors_of_sums(builder) -> Vectors:
    return Vectors(builder, types.NumberClass(types.float32), CHOSEN.vector_bytes, CHOSEN.fused)


@intrinsic
def is_finite(typing_context, rows, sums):
    """Whether so many rows of `sums` hold neither an infinity nor a NaN."""

    def codegen(context, builder, signature, arguments):
        rows, sums = arguments
        emit = _vectors_of_sums(builder)
        found = emit.register("nan")  # what is not finite makes NaN, times zero, and NaN remains
        builder.store(emit.zero(), found)
        with cgutils.for_range(builder, builder.mul(rows, index(SIDE // emit.lanes))) as loop:
            value = emit.load(emit.at(emit.pointer(sums), builder.mul(loop.index, index(emit.lanes))))
            builder.store(emit.multiply_add(value, emit.zero(), builder.load(found)), found)
        total = builder.load(found)
        lanes = builder.fcmp_ordered("ord", total, total)
        every = builder.bitcast(lanes, ir.IntType(emit.lanes))
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
    """c[i,j] = clamp(sums[i,j] + start[i,j] + residual[i,j]), as `gemm_tile` has it, for i < rows, j < columns."""

    def codegen(context, builder, signature, arguments):
        if _terms(signature.args[0]):
            _emit_finish(vectors_of(builder, signature), _vectors_of_sums(builder), *arguments[1:])
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    return types.void(dtype, *[types.intp] * 9, bound, bound), codegen


def _emit_finish(
    emit, wide, rows, columns, sums, start, start_row, residual_offset, c, c_row, past_caches, low, high
) -> None:
    builder = emit.builder
    vectors = range(SIDE // emit.lanes)
    masks = [emit.mask(columns, j * emit.lanes) for j in vectors]
    lows, highs = emit.splat(low), emit.splat(high)
    has_residual = builder.icmp_signed("!=", residual_offset, index(0))
    streamed = builder.icmp_signed("!=", past_caches, index(0))
    streamed = builder.and_(streamed, builder.icmp_signed("==", columns, index(SIDE)))
    with cgutils.for_range(builder, rows) as loop:
        line = wide.at(wide.pointer(sums), builder.mul(loop.index, index(SIDE)))
        begin = emit.at(emit.pointer(start), builder.mul(loop.index, start_row))
        offset = builder.mul(builder.mul(loop.index, c_row), index(emit.itemsize))
        target = builder.add(c, offset)
        residual = builder.select(has_residual, builder.add(target, residual_offset), start)
        none = ir.Constant(masks[0].type, None)
        for j, mask in zip(vectors, masks, strict=True):
            at = index(j * emit.lanes)
            total = builder.fadd(wide.load(wide.at(line, at)), emit.load(emit.at(begin, at), mask))
            added = emit.load(emit.at(emit.pointer(residual), at), builder.select(has_residual, mask, none))
            total = emit.clamp(builder.fadd(total, added), lows, highs)
            place = emit.at(emit.pointer(target), at)
            with builder.if_else(streamed, likely=False) as (then, otherwise):
                with then:
                    emit.stream(total, place)
                with otherwise:
                    emit.store(total, place, mask)
