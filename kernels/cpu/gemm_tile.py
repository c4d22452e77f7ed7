"""The inner loop of every matrix product: a register tile written out in vector code.

Addresses are integers and strides count elements, so one compiled function serves every shape and layout. `dtype` is
np.float32, np.float64 or BFLOAT16. Nothing is written outside the tile that the arguments describe.
"""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import CACHE_LINE, L1_PERIOD, Vectors, arithmetic_type, emit_cases, index, vectors_of
from .tiles import CHOSEN

GEMM_ROWS = CHOSEN.rows
UNROLL = CHOSEN.unroll
ASK_STEP = CHOSEN.ask_step
STRETCH = 8  # products from asking for what is needed later to asking again: the turns between have no time for it
ASKS_A_STRETCH = STRETCH // ASK_STEP
SUMMED_AT_ONCE = 256  # products in a running sum: its rounding error grows with its length, that of sums of sums less
ROWS_A_STRETCH = 2  # of c, whose lines a stretch asks for
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
    Meanwhile b is copied into the packed `panel`, if that is not 0, and what is needed later is asked for in L2: one
    cache line every ASK_STEP k, that which holds `ahead + k//ASK_STEP*ahead_step`, except for products that fill no
    stretch. A tile that packs b asks with each row for the lines of a row of `columns` at `ahead + k*ahead_step`.

    Assumes: depth >= 0; a's rows and b's columns readable to the tile's full size; b in a panel already where `panel`
    is 0, which of bfloat16 it is; c's rows at multiples of a vector if `past_caches` is not 0.
    """

    def codegen(context, builder, signature, arguments):
        tile_rows, *rest = arguments[1:]
        emit = vectors_of(builder, signature)
        emit_cases(builder, tile_rows, GEMM_ROWS, lambda height: emit_tile(emit, height, *rest))
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    signature = types.void(dtype, *[types.intp] * 18, bound, bound)
    return signature, codegen


def emit_tile(
    emit, height, rows, columns, depth, a, a_row, a_step, b, b_step, panel, ahead, ahead_step,
    start, start_row, residual_offset, c, c_row, past_caches, low, high, *, copied=None,
):  # fmt: skip
    """One height of `gemm_tile`: height x vectors sums stay in registers, and go to the totals now and then.

    With each stretch `copied` does what it has to do, if it is there, instead of asking for what is needed later.
    """
    builder, width = emit.builder, CHOSEN.vectors
    masks = [emit.mask(columns, j * emit.lanes) for j in range(width)]
    sums = [[emit.register(f"sum{height}_{i}_{j}") for j in range(width)] for i in range(height)]
    _for_each(emit, sums, lambda register: builder.store(emit.zero(), register))
    output = _OutputLines(emit, height, c, c_row, residual_offset, past_caches)
    output.ask_for_residual()
    a_rows, b_rows = _Rows(emit, a, a_row, a_step, height), _Kernel(emit, b, b_step, panel, ahead, ahead_step)
    totals = _Totals(emit, sums)
    at_once = index(SUMMED_AT_ONCE // emit.factors)
    chunks = builder.sdiv(builder.add(depth, builder.sub(at_once, index(1))), at_once)
    with cgutils.for_range(builder, chunks) as chunk:
        totals.take_sums(chunk.index)
        first = builder.mul(chunk.index, at_once)
        left = builder.sub(depth, first)
        count = builder.select(builder.icmp_signed("<", left, at_once), left, at_once)
        stretches = builder.sdiv(count, index(STRETCH))
        # a branch between the products of a turn would cost registers: b is packed in the loop below
        stretches = builder.select(builder.icmp_signed("==", panel, index(0)), stretches, index(0))
        with cgutils.for_range(builder, stretches) as loop:
            stretch = builder.add(builder.sdiv(first, index(STRETCH)), loop.index)
            output.ask_for_rows(stretch)
            if copied is not None:
                copied.copy_some()
            else:
                _ask_for_lines(emit, emit.pointer(ahead), ahead_step, stretch)
            with cgutils.for_range(builder, index(STRETCH // UNROLL)):
                for k, b_vectors in enumerate(b_rows.take_packed(UNROLL)):
                    _multiply_step(emit, sums, a_rows, k, b_vectors)
                a_rows.advance(UNROLL)
        with cgutils.for_range(builder, builder.sub(count, builder.mul(stretches, index(STRETCH)))):
            _multiply_step(emit, sums, a_rows, 0, b_rows.take())
            a_rows.advance(1)
    totals.add_to_sums(chunks)
    _add_rows(emit, sums, masks, rows, start, start_row)
    with builder.if_then(builder.icmp_signed("!=", residual_offset, index(0)), likely=False):
        _add_rows(emit, sums, masks, rows, builder.add(c, residual_offset), c_row)
    _store_tile(emit, sums, masks, rows, columns, c, c_row, past_caches, low, high)


def _ask_for_lines(emit: Vectors, first, step, stretch) -> None:
    """Asks for the lines that are the stretch's."""
    builder = emit.builder
    line = emit.at(first, builder.mul(stretch, builder.mul(step, index(ASKS_A_STRETCH))))
    for _ in range(ASKS_A_STRETCH):
        emit.prefetch(line)
        line = emit.at(line, step)


class _Kernel:
    """The rows of b, one after the other."""

    def __init__(self, emit: Vectors, b, b_step, panel, ahead, ahead_step) -> None:
        self.emit, self.step, self.panel, self.ahead_step = emit, b_step, panel, ahead_step
        self.next = cgutils.alloca_once_value(emit.builder, emit.pointer(b))
        self.copy = cgutils.alloca_once_value(emit.builder, emit.pointer(panel))
        self.ahead = cgutils.alloca_once_value(emit.builder, emit.pointer(ahead))

    def take_packed(self, count: int) -> Iterator[list]:
        """The vectors of the next rows, which are those of a panel: constants apart, so one pointer serves them all."""
        emit, builder = self.emit, self.emit.builder
        line, width = builder.load(self.next), CHOSEN.vectors * emit.lanes * emit.factors
        builder.store(emit.at(line, index(count * width)), self.next)
        for k in range(count):
            yield emit.load_factors(emit.at(line, index(k * width)))

    def take(self) -> list:
        """The vectors of the next row. If a panel is wanted they are copied into it, and as many asked for."""
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
            ahead = builder.load(self.ahead)
            emit.prefetch_span(ahead, CHOSEN.vectors, level=2)
            builder.store(emit.at(ahead, self.ahead_step), self.ahead)
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

    The 28 of AVX-512 at once would fill the queue of what the core waits for, and the first rows of a and b would wait
    behind them: a tenth of the time at depth 64 (Zen 4). So each stretch asks for those of ROWS_A_STRETCH rows, and a
    tile that packs b, which has none, for no row. Rows that collide in L1 (see `rows_collide`) come to L2, for in L1
    they would drive each other out, and a's rows too. None are wanted where c is written past the caches. Where rows do
    not begin with a line, most reach into one more.
    """

    def __init__(self, emit: Vectors, height: int, c, c_row, residual_offset, past_caches) -> None:
        builder = emit.builder
        self.emit, self.height, self.c, self.c_row = emit, height, emit.pointer(c), c_row
        self.lines_a_row = -(-CHOSEN.vectors * emit.lanes * emit.itemsize // CACHE_LINE)
        stretches = index(-(-height // ROWS_A_STRETCH))
        self.stretches = builder.select(builder.icmp_signed("==", past_caches, index(0)), stretches, index(0))
        row_bytes = builder.mul(c_row, index(emit.itemsize))
        begins = builder.and_(builder.or_(row_bytes, c), index(CACHE_LINE - 1))
        across = builder.icmp_signed("!=", begins, index(0))
        self.reached_into = builder.select(across, index(CACHE_LINE // emit.itemsize), index(0))
        apart = builder.and_(row_bytes, index(L1_PERIOD // 2 - 1))
        self.collide = builder.icmp_signed("==", apart, index(0))
        self.residual = emit.pointer(builder.add(c, residual_offset))
        self.has_residual = builder.icmp_signed("!=", residual_offset, index(0))

    def ask_for_residual(self) -> None:
        """Before the first stretch: asks for all of the residual."""
        with self.emit.builder.if_then(self.has_residual, likely=False):
            self._ask(self.residual, self.height, 2)

    def ask_for_rows(self, stretch) -> None:
        """Asks for the rows of c that are the stretch's, if there are any."""
        builder = self.emit.builder
        with builder.if_then(builder.icmp_signed("<", stretch, self.stretches), likely=False):
            rows = self.emit.at(self.c, builder.mul(stretch, builder.mul(self.c_row, index(ROWS_A_STRETCH))))
            with builder.if_else(self.collide) as branches:
                for branch, level in zip(branches, (2, 1), strict=True):
                    with branch:
                        self._ask(rows, ROWS_A_STRETCH, level)

    def _ask(self, line, rows: int, level: int) -> None:
        emit, line_length = self.emit, CACHE_LINE // self.emit.itemsize
        for _ in range(rows):
            for part in range(self.lines_a_row):
                last = emit.at(line, index(part * line_length))
                emit.prefetch(last, level, write=level == 1)
            emit.prefetch(emit.at(last, self.reached_into), level, write=level == 1)
            line = emit.at(line, self.c_row)


def _for_each(emit: Vectors, tile, action) -> None:
    for row in tile:
        for register in row:
            action(register)


class _Rows:
    """The elements of a's rows, each loaded when it is wanted.

    There is a pointer to every other row, in a slot of its own; the row after it is reached by an addressing mode. Left
    to itself the compiler goes from row to row by additions that wait for each other, and take turns with the
    arithmetic. So it is not told that one pointer follows from another.
    """

    def __init__(self, emit: Vectors, a, a_row, a_step, height: int) -> None:
        builder, self.emit, self.row, self.step, self.slots = emit.builder, emit, a_row, a_step, []
        for first in range(0, height, 2):
            pointer = emit.at(emit.pointer(a), builder.mul(a_row, index(first)))
            self.slots.append(cgutils.alloca_once_value(builder, _opaque(builder, pointer)))

    def broadcast(self, row: int, k: int):
        """The factors of a row, k products on."""
        emit, builder = self.emit, self.emit.builder
        pointer = emit.at(builder.load(self.slots[row // 2]), self.row if row % 2 else index(0))
        return emit.broadcast_factors(emit.at(pointer, builder.mul(self.step, index(k))))

    def advance(self, count: int) -> None:
        """`count` products on: not earlier, or the compiler would keep pointers of before and after."""
        emit, builder = self.emit, self.emit.builder
        for slot in self.slots:
            pointer = _opaque(builder, builder.load(slot), stays=True)
            builder.store(emit.at(pointer, builder.mul(self.step, index(count))), slot)


def _opaque(builder, value, stays: bool = False):
    """The same value, of which the compiler no longer knows where it comes from; or where it `stays`, when."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], stays)


def _multiply_step(emit: Vectors, sums, a_rows: _Rows, k: int, b_vectors) -> None:
    """A row of b, times an element of each row of a, which lies k products on.

    A multiply-add of AVX-512 reads its element from memory itself. Where the address is but a pointer it counts as one
    instruction then, so these rows load theirs for each vector anew: a core that two threads share is short of
    instructions first, and of loads not yet (3 to 7 % of a layer, Emerald Rapids). LLVM has none for pairs.
    """
    builder, anew = emit.builder, CHOSEN.broadcasts and emit.factors == 1
    for i, row in enumerate(sums):
        for j, (b_vector, register) in enumerate(zip(b_vectors, row, strict=True)):
            if j == 0 or (anew and i % 2 == 0):
                if j > 0:
                    emit.in_order(row[:j])
                a_value = a_rows.broadcast(i, k)
            builder.store(emit.add_products(a_value, b_vector, builder.load(register)), register)
        emit.in_order(row)


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
