"""The inner loop of every matrix product: a register tile written out in vector code.

Addresses are integers and strides count elements, so one compiled function serves every shape and layout. `dtype` is
np.float32, np.float64 or BFLOAT16. Nothing is written outside the tile that the arguments describe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import CACHE_LINE, L1_PERIOD, Vectors, arithmetic_type, emit_cases, index, vectors_of
from .tiles import CHOSEN

GEMM_ROWS = CHOSEN.rows
UNROLL = CHOSEN.unroll
ASK_STEP = CHOSEN.ask_step
ASKS_A_TURN = UNROLL // ASK_STEP  # lines asked for in one turn of the inner loop
SUMMED_AT_ONCE = 256  # products in a running sum: its rounding error grows with its length, that of sums of sums less
ROWS_A_POINTER = 3
FEW_LINES = 8  # of c, that may be asked for at once
EARLY = 128  # rows of b from being asked for to being read, where it is not packed: more than memory takes to answer


@intrinsic
def gemm_columns(typing_context, dtype):
    """Columns of `gemm_tile`; a packed kernel comes in panels of so many."""

    def codegen(context, builder, signature, arguments):
        return index(CHOSEN.vectors * vectors_of(builder, signature).lanes)

    return types.intp(dtype), codegen


@intrinsic
def gemm_tile(
    typing_context, dtype, tile_rows, rows, columns, depth,
    a, a_row, a_step, b, b_step, panel, ahead, ahead_step, start, start_row, residual_offset, c, c_row, past_caches,
    low, high,
):  # fmt: skip
    """c[i*c_row + j] = clamp(sum over k < depth of a[i*a_row + k*a_step] * b[k*b_step + j]
                           + start[i*start_row + j] + residual[i*c_row + j])

    for i < rows, j < columns. The residual is at c + residual_offset, in bytes; there is none where that is 0. Of
    bfloat16, depth counts pairs, which lie side by side in a and in the panel that b is: k is one's first element.
    `tile_rows` is one of GEMM_ROWS, at least `rows`; `columns` is at most `vectors*lanes`.
    All `tile_rows` rows of a and all `vectors*lanes` columns of b are read, whatever `rows` and `columns` are.
    Meanwhile b is copied into the packed `panel`, if that is not 0, and one cache line every ASK_STEP k is asked for in
    L2: that which holds `ahead + k//ASK_STEP*ahead_step`. Where UNROLL > 1, a tile that packs b asks for nothing, nor
    do products that fill no turn.

    Assumes: depth >= 0; a's rows and b's columns readable to the tile's full size; b in a panel already where `panel`
    is 0, which of bfloat16 it is; c's rows at multiples of a vector if `past_caches` is not 0.
    """

    def codegen(context, builder, signature, arguments):
        tile_rows, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        emit_cases(builder, tile_rows, GEMM_ROWS, lambda height: _gemm_tile(emit, height, *rest))
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    signature = types.void(dtype, *[types.intp] * 18, bound, bound)
    return signature, codegen


def _gemm_tile(
    emit, height, rows, columns, depth, a, a_row, a_step, b, b_step, panel, ahead, ahead_step,
    start, start_row, residual_offset, c, c_row, past_caches, low, high,
):  # fmt: skip
    """One height of `gemm_tile`: height x vectors sums stay in registers, and go to the totals now and then."""
    builder, width = emit.builder, CHOSEN.vectors
    masks = [emit.mask(columns, j * emit.lanes) for j in range(width)]
    sums = [[emit.register(f"sum{height}_{i}_{j}") for j in range(width)] for i in range(height)]
    _for_each(emit, sums, lambda register: builder.store(emit.zero(), register))
    output = _OutputLines(emit, height, c, c_row, residual_offset, past_caches)
    output.begin()
    a_rows, b_rows = _row_pointers(emit, a, a_row, height), _Kernel(emit, b, b_step, panel)
    totals = _Totals(emit, sums)
    at_once = index(SUMMED_AT_ONCE // emit.factors)
    chunks = builder.sdiv(builder.add(depth, builder.sub(at_once, index(1))), at_once)
    with cgutils.for_range(builder, chunks) as chunk:
        totals.take_sums(chunk.index)
        first = builder.mul(chunk.index, at_once)
        left = builder.sub(depth, first)
        count = builder.select(builder.icmp_signed("<", left, at_once), left, at_once)
        turns = builder.sdiv(count, index(UNROLL))
        if UNROLL > 1:  # a branch between the products of a turn would cost registers: b is packed in the loop below
            turns = builder.select(builder.icmp_signed("==", panel, index(0)), turns, index(0))
        with cgutils.for_range(builder, turns) as loop:
            turn = builder.add(builder.sdiv(first, index(UNROLL)), loop.index)
            if UNROLL == 1:
                _multiply_step(emit, sums, a_rows, a_row, b_rows.take())
            else:
                for k, b_vectors in enumerate(b_rows.take_packed(UNROLL)):
                    _multiply_step(emit, sums, a_rows, a_row, b_vectors, builder.mul(a_step, index(k)))
            _advance(emit, a_rows, builder.mul(a_step, index(UNROLL)))
            later = emit.at(emit.pointer(ahead), builder.mul(turn, builder.mul(ahead_step, index(ASKS_A_TURN))))
            output.take_turn(turn, later)
            for ask in range(1, ASKS_A_TURN):
                emit.prefetch(emit.at(later, builder.mul(ahead_step, index(ask))))
        if UNROLL > 1:
            with cgutils.for_range(builder, builder.sub(count, builder.mul(turns, index(UNROLL)))):
                _multiply_step(emit, sums, a_rows, a_row, b_rows.take())
                _advance(emit, a_rows, a_step)
    totals.add_to_sums(chunks)
    _add_rows(emit, sums, masks, rows, start, start_row)
    with builder.if_then(builder.icmp_signed("!=", residual_offset, index(0)), likely=False):
        _add_rows(emit, sums, masks, rows, builder.add(c, residual_offset), c_row)
    _store_tile(emit, sums, masks, rows, columns, c, c_row, past_caches, low, high)


class _Kernel:
    """The rows of b, one after the other."""

    def __init__(self, emit: Vectors, b, b_step, panel) -> None:
        self.emit, self.step, self.panel = emit, b_step, panel
        self.next = cgutils.alloca_once_value(emit.builder, emit.pointer(b))
        self.copy = cgutils.alloca_once_value(emit.builder, emit.pointer(panel))

    def take_packed(self, count: int) -> Iterator[list]:
        """The vectors of the next rows, which are those of a panel: constants apart, so one pointer serves them all."""
        emit, builder = self.emit, self.emit.builder
        line, width = builder.load(self.next), CHOSEN.vectors * emit.lanes * emit.factors
        builder.store(emit.at(line, index(count * width)), self.next)
        for k in range(count):
            yield emit.load_factors(emit.at(line, index(k * width)))

    def take(self) -> list:
        """The vectors of the next row, copied into the panel on the way if one is wanted."""
        emit, builder = self.emit, self.emit.builder
        line = builder.load(self.next)
        builder.store(emit.at(line, self.step), self.next)
        vectors = emit.load_factors(line)
        if emit.factors > 1:
            return vectors
        with builder.if_then(builder.icmp_signed("!=", self.panel, index(0)), likely=False):
            copy = builder.load(self.copy)
            for j, vector in enumerate(vectors):
                emit.store(vector, emit.at(copy, index(j * emit.lanes)))
            builder.store(emit.at(copy, index(CHOSEN.vectors * emit.lanes)), self.copy)
            emit.prefetch_span(emit.at(line, builder.mul(self.step, index(EARLY))), CHOSEN.vectors, level=2)
        return vectors


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


class _OutputLines:
    """Asks for the tile's cache lines of c and of the residual, so that they have come when they are needed.

    A `few` at once, for which a turn then needs no instructions; else one a turn. The 28 of AVX-512 at once would fill
    the queue of what the core waits for, and the first rows of a and b would wait behind them: a tenth of the time at
    depth 64 (Zen 4). Rows that collide in L1 (see `rows_collide`) come to L2, for in L1
    they would drive each other out, and a's rows too. None are wanted where c is written past the caches. With one
    that is asked for in a turn goes the next one, where rows do not begin with a line: most reach into one more then.
    """

    def __init__(self, emit: Vectors, height: int, c, c_row, residual_offset, past_caches) -> None:
        builder = emit.builder
        self.emit, self.height, self.c, self.c_row = emit, height, emit.pointer(c), c_row
        self.lines_a_row = -(-CHOSEN.vectors * emit.lanes * emit.itemsize // CACHE_LINE)
        self.at_once = height * self.lines_a_row <= FEW_LINES
        self.nothing = cgutils.alloca_once(builder, emit.type)  # a line that is in L1 anyway
        self.wanted = builder.icmp_signed("==", past_caches, index(0))
        lines = builder.select(self.wanted, index(height * self.lines_a_row), index(0))
        row_bytes = builder.mul(c_row, index(emit.itemsize))
        begins = builder.and_(builder.or_(row_bytes, c), index(CACHE_LINE - 1))
        across = builder.icmp_signed("!=", begins, index(0))
        self.reached_into = builder.select(across, index(CACHE_LINE // emit.itemsize), index(0))
        apart = builder.and_(row_bytes, index(L1_PERIOD // 2 - 1))
        self.collide = builder.icmp_signed("==", apart, index(0))
        self.to_l1 = builder.select(self.collide, index(0), lines)
        self.to_l2 = builder.select(self.collide, lines, index(0))
        self.residual = emit.pointer(builder.add(c, residual_offset))
        self.has_residual = builder.icmp_signed("!=", residual_offset, index(0))

    def begin(self) -> None:
        """Before the first turn: asks for all of the residual's, and for all of c's where they are few."""
        builder = self.emit.builder
        with builder.if_then(self.has_residual, likely=False):
            self._ask_for_all(self.residual, 2)
        if not self.at_once:
            return
        with builder.if_then(self.wanted), builder.if_else(self.collide) as branches:
            for branch, level in zip(branches, (2, 1), strict=True):
                with branch:
                    self._ask_for_all(self.c, level)

    def _ask_for_all(self, tile, level: int) -> None:
        builder, emit, line_length = self.emit.builder, self.emit, CACHE_LINE // self.emit.itemsize
        for row, part in itertools.product(range(self.height), range(self.lines_a_row)):
            offset = builder.add(builder.mul(self.c_row, index(row)), index(part * line_length))
            emit.prefetch(emit.at(tile, offset), level, write=level == 1)

    def take_turn(self, turn, otherwise) -> None:
        """Asks in L2 for what lies at `otherwise`; where lines of the tile are left, for that of the turn's number too.

        One that belongs into L2 comes in place of the other.
        """
        builder, emit = self.emit.builder, self.emit
        if self.at_once:
            emit.prefetch(otherwise)
            return
        row, part = (operation(turn, index(self.lines_a_row)) for operation in (builder.udiv, builder.urem))
        offset = builder.add(builder.mul(row, self.c_row), builder.mul(part, index(CACHE_LINE // emit.itemsize)))
        line, nothing = emit.at(self.c, offset), builder.bitcast(self.nothing, self.c.type)
        first = builder.select(builder.icmp_signed("<", turn, self.to_l1), line, nothing)
        emit.prefetch(first, level=1, write=True)
        emit.prefetch(emit.at(first, self.reached_into), level=1, write=True)
        emit.prefetch(builder.select(builder.icmp_signed("<", turn, self.to_l2), line, otherwise))


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


def _multiply_step(emit: Vectors, sums, a_rows, a_row, b_vectors, further=None) -> None:
    """One k: a row of b, times an element of each row of a, the present one or one that lies `further` on."""
    builder, further = emit.builder, index(0) if further is None else further
    for i, row in enumerate(sums):
        pointer = builder.load(a_rows[i // ROWS_A_POINTER])
        element = builder.add(builder.mul(a_row, index(i % ROWS_A_POINTER)), further)
        a_value = emit.broadcast_factors(emit.at(pointer, element))
        for b_vector, register in zip(b_vectors, row, strict=True):
            builder.store(emit.add_products(a_value, b_vector, builder.load(register)), register)
        if UNROLL > 1:
            emit.in_order(row)


def _advance(emit: Vectors, a_rows, step) -> None:
    """The pointers to rows of a, `step` elements on."""
    for slot in a_rows:
        emit.builder.store(_opaque(emit.builder, emit.at(emit.builder.load(slot), step)), slot)


def _add_rows(emit: Vectors, tile, masks, rows, source, source_row) -> None:
    """Adds rows that lie `source_row` apart to the tile. One past the end gets the last one's: it is never stored."""
    builder, last = emit.builder, emit.builder.sub(rows, index(1))
    for i, row in enumerate(tile):
        inside = builder.select(builder.icmp_signed("<", index(i), rows), index(i), last)
        line = emit.at(emit.pointer(source), builder.mul(inside, source_row))
        for value, register in zip(emit.load_span(line, masks), row, strict=True):
            builder.store(builder.fadd(builder.load(register), value), register)
        emit.in_order(row)


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
