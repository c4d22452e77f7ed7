"""What AMX's registers are loaded from: float32 as the three bfloat16 whose sum it is, in tiles (see `amx_tile`).

32 values that follow each other in the depth are 16 pairs, of the i-th and the one 16 further on, each a word of 32
bits. Where the depth runs along the rows of a matrix, two vectors side by side make the pairs of a row; where it runs
along the columns, two rows make those of as many columns. A tile of a has a row of pairs for each of its rows, one of b
a column of pairs for each of its columns: as they come, or transposed.
"""

from __future__ import annotations

import contextlib

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .amx import SIDE, STEP, STEP_BYTES, terms_of
from .jit import kernel
from .memory import ceil_div
from .simd import CACHE_LINE, Vectors, index, transposed, vectors_of

TERMS = 3
EARLY = 64  # rows of b from being asked for to being packed
PARTS_A_STEP = 32  # of a panel: pieces of work that `amx_tile` does in passing
_WIDTH = 16  # a vector, a tile's rows and half a step
_LARGEST = float.fromhex("0x1.fep127")  # of bfloat16: rounded, a float32 may be infinite
_PAIRS = ir.VectorType(ir.IntType(32), _WIDTH)


@kernel
def split_bytes(rows, depth):
    """Bytes that so many rows or columns take, in whole tiles."""
    return ceil_div(rows, SIDE) * ceil_div(depth, STEP) * TERMS * STEP_BYTES


def _every(word: int) -> ir.Constant:
    return ir.Constant(_PAIRS, [word] * _WIDTH)


class _Split:
    """Emits the splitting of vectors of float32."""

    def __init__(self, builder) -> None:
        self.builder = builder
        self.wide = Vectors(builder, types.NumberClass(types.float32), 64, True)

    def terms(self, value) -> list:
        """The bits of the three bfloat16, each in the upper half of a lane. Infinity is the largest, then itself.

        Of the last one the lower half is not clear where there was a NaN, or less than 2^-126 left.
        """
        builder, found = self.builder, []
        most, least = (ir.Constant(self.wide.type, [sign * _LARGEST] * _WIDTH) for sign in (1, -1))
        nearest = self.wide.clamp(value, least, most)
        for _ in range(TERMS - 1):
            bits = builder.bitcast(nearest, _PAIRS)
            found.append(builder.and_(builder.add(bits, _every(0x8000)), _every(-0x10000)))
            nearest = value = builder.fsub(value, builder.bitcast(found[-1], self.wide.type))
        return [*found, builder.bitcast(value, _PAIRS)]  # what is left has no more digits

    def pairs(self, first, second) -> list:
        """The pairs of two vectors, for each term."""
        both = zip(self.terms(first), self.terms(second), strict=True)
        builder, upper = self.builder, _every(-0x10000)
        return [builder.or_(builder.lshr(one, _every(16)), builder.and_(other, upper)) for one, other in both]

    def store(self, pairs, address) -> None:
        self.builder.store(pairs, self.builder.inttoptr(address, _PAIRS.as_pointer()), align=CACHE_LINE)

    def store_transposed(self, rows: list, base, first: int, apart: int) -> None:
        """The pairs of 16 rows as columns: of each term those of a row `first` bytes on, the next `apart` from it."""
        for term, square in enumerate(zip(*rows, strict=True)):
            for i, pairs in enumerate(transposed(self.builder, list(square))):
                self.store(pairs, _place(self.builder, base, term, index(first + i * apart)))

    def load(self, address, left, allowed):
        """A vector of which `left` elements are there, and none unless `allowed`."""
        mask = self.wide.mask(self.builder.select(allowed, left, index(0)))
        return self.wide.load(self.wide.pointer(address), mask)

    def pairs_along_row(self, address, left, allowed) -> list:
        """Those of 32 elements of a row, of which `left` are there."""
        builder = self.builder
        second = builder.add(address, index(_WIDTH * self.wide.itemsize))
        rest = builder.sub(left, index(_WIDTH))
        return self.pairs(self.load(address, left, allowed), self.load(second, rest, allowed))

    def pairs_of_rows(self, address, row_bytes, rows, columns, number: int) -> list:
        """Those of rows `number` and `number + 16` of so many."""
        found = []
        for row in (number, number + _WIDTH):
            place = self.builder.add(address, self.builder.mul(row_bytes, index(row)))
            found.append(self.load(place, columns, self.builder.icmp_signed("<", index(row), rows)))
        return self.pairs(*found)


@contextlib.contextmanager
def _each_step(builder, depth, target):
    """A loop over the depth: (the step's first k, how many are left, the address of its terms)."""
    steps = builder.sdiv(builder.add(depth, index(STEP - 1)), index(STEP))
    with cgutils.for_range(builder, steps) as loop:
        k = builder.mul(loop.index, index(STEP))
        yield k, builder.sub(depth, k), builder.add(target, builder.mul(loop.index, index(TERMS * STEP_BYTES)))


def _place(builder, base, term: int, offset):
    return builder.add(base, builder.add(index(term * STEP_BYTES), offset))


@intrinsic
def split_rows(typing_context, rows, depth, source, row_bytes, target):
    """Up to 32 rows of a, side by side in the depth, as a tile's rows: each step has 2 tiles a term."""

    def codegen(context, builder, signature, arguments):
        rows, depth, source, row_bytes, target = arguments
        split = _Split(builder)
        with _each_step(builder, depth, target) as (k, left, base), cgutils.for_range(builder, rows) as row:
            place = builder.add(source, builder.mul(row.index, row_bytes))
            place = builder.add(place, builder.mul(k, index(split.wide.itemsize)))
            found = split.pairs_along_row(place, left, ir.Constant(ir.IntType(1), 1))
            for term, pairs in enumerate(found):
                split.store(pairs, _place(builder, base, term, builder.mul(row.index, index(CACHE_LINE))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def split_columns(typing_context, rows, columns, source, row_bytes, target):
    """Up to 32 columns of a matrix, whose rows are the depth, as rows of a tile: the transpose of `split_panel`'s."""

    def codegen(context, builder, signature, arguments):
        rows, columns, source, row_bytes, target = arguments
        split = _Split(builder)
        with _each_step(builder, rows, target) as (m, left, base):
            line = builder.add(source, builder.mul(m, row_bytes))
            for half in range(2):
                place = builder.add(line, index(half * _WIDTH * split.wide.itemsize))
                inside = builder.sub(columns, index(half * _WIDTH))
                found = [split.pairs_of_rows(place, row_bytes, left, inside, i) for i in range(_WIDTH)]
                split.store_transposed(found, base, half * _WIDTH * CACHE_LINE, CACHE_LINE)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


def emit_panel_part(emit: Vectors, depth, columns, source, row_bytes, number, target) -> None:
    """Half a row of pairs of a panel of b: of up to 32 columns of a matrix, whose rows are the depth, 16.

    A pair of float32 is of two rows 16 apart, of bfloat16 of two that follow each other.
    """
    builder = emit.builder
    row, half = builder.lshr(number, index(1)), builder.and_(number, index(1))
    inside = builder.sub(columns, builder.mul(half, index(_WIDTH)))
    at = builder.add(builder.mul(row, index(2 * CACHE_LINE)), builder.mul(half, index(CACHE_LINE)))
    step = builder.lshr(row, index(4))
    k, apart = builder.add(builder.mul(step, index(STEP - _WIDTH)), row), _WIDTH
    if emit.factors > 1:
        k, apart = builder.mul(row, index(2)), 1
    line = builder.add(source, builder.add(builder.mul(k, row_bytes), builder.mul(half, index(_WIDTH * emit.itemsize))))
    for early in (EARLY, EARLY + apart):
        emit.prefetch(emit.pointer(builder.add(line, builder.mul(row_bytes, index(early)))))
    left = builder.sub(depth, k)
    if emit.factors > 1:
        row_stride = builder.sdiv(row_bytes, index(emit.itemsize))
        copy = emit.pointer(builder.add(target, at))
        emit.copy_factors(emit.pointer(line), row_stride, left, [emit.mask(inside)], copy)
        return
    split = _Split(builder)
    base = builder.add(target, builder.mul(step, index((TERMS - 1) * STEP_BYTES)))
    for term, pairs in enumerate(split.pairs_of_rows(line, row_bytes, left, inside, 0)):
        split.store(pairs, _place(builder, base, term, at))


@intrinsic
def split_panel(typing_context, dtype, depth, columns, source, row_bytes, target):
    """A panel of b, packed at once."""

    def codegen(context, builder, signature, arguments):
        _, depth, columns, source, row_bytes, target = arguments
        emit = vectors_of(builder, signature)
        steps = builder.sdiv(builder.add(depth, index(STEP - 1)), index(STEP))
        if terms_of(signature.args[0]):
            with cgutils.for_range(builder, builder.mul(steps, index(PARTS_A_STEP))) as part:
                emit_panel_part(emit, depth, columns, source, row_bytes, part.index, target)
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 5), codegen


@intrinsic
def split_transposed_panel(typing_context, depth, columns, source, column_bytes, target):
    """The same of a matrix whose columns are the depth, `column_bytes` apart."""

    def codegen(context, builder, signature, arguments):
        depth, columns, source, column_bytes, target = arguments
        split = _Split(builder)
        with _each_step(builder, depth, target) as (k, left, base):
            line = builder.add(source, builder.mul(k, index(split.wide.itemsize)))
            for half in range(2):
                found = []
                for j in range(half * _WIDTH, (half + 1) * _WIDTH):
                    place = builder.add(line, builder.mul(column_bytes, index(j)))
                    inside = builder.icmp_signed("<", index(j), columns)
                    found.append(split.pairs_along_row(place, left, inside))
                split.store_transposed(found, base, half * CACHE_LINE, 2 * CACHE_LINE)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def join_pairs(typing_context, source, first, second):
    """The float32 of the 16 pairs at `source`, whose terms are a step's apart: 16 at `first`, 16 at `second`."""

    def codegen(context, builder, signature, arguments):
        source, *targets = arguments
        split = _Split(builder)
        places = [_place(builder, source, term, index(0)) for term in range(TERMS)]
        words = [builder.load(builder.inttoptr(at, _PAIRS.as_pointer()), align=CACHE_LINE) for at in places]
        first = [builder.bitcast(builder.shl(each, _every(16)), split.wide.type) for each in words]
        second = [builder.bitcast(builder.and_(each, _every(-0x10000)), split.wide.type) for each in words]
        kind = split.wide.type
        infinity = ir.Constant(kind, [float("inf")] * _WIDTH)
        magnitude = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), "llvm.fabs.v16f32")
        for (high, middle, low), target in zip((first, second), targets, strict=True):
            # The lowest is NaN then: infinity less infinity. It is of any other NaN too, whose higher ones may be zero.
            infinite = builder.fcmp_ordered("==", builder.call(magnitude, [middle]), infinity)
            less = builder.select(infinite, middle, builder.fadd(middle, low))  # with high, middle may be too large
            split.wide.store(builder.fadd(high, less), split.wide.pointer(target))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen
