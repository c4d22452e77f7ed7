"""A block's share of a matrix product on tensor cores: copies into shared memory, fragments, products, results.

Each function here makes a device function for one tile and one kind of number, to be composed into kernels. An operand
is `deep` if the depth (the summed index) runs along its rows in memory, `wide` if it runs from row to row.
A stage of the pipeline holds two steps, a step being what one matrix product eats: 8 float32 or 16 half numbers deep.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from . import fragments, ptx
from .fragments import CopyPlan, Layout, between, copy_plan, inlined, select

STEP_BYTES = 32  # along the depth: two chunks
TF32_BITS = np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of a float32
HALF_UNIT = np.uint32(0x1000)  # half of the last of them


class Numbers(NamedTuple):
    """How an operand's numbers are stored and multiplied."""

    name: str  # float32 (three TF32 products), tf32 (one), bfloat16, float16
    itemsize: int

    @property
    def step(self) -> int:
        return STEP_BYTES // self.itemsize

    @property
    def pointer(self) -> types.CPointer:
        """Half numbers are passed as their bits."""
        return types.CPointer(types.float32 if self.itemsize == 4 else types.uint16)


NUMBERS = {
    "float32": Numbers("float32", 4),
    "tf32": Numbers("tf32", 4),
    "bfloat16": Numbers("bfloat16", 2),
    "float16": Numbers("float16", 2),
}


def operand_layout(numbers: Numbers, deep: bool, outer: int) -> Layout:
    """A stage of an operand with `outer` rows (of A) or columns (of B)."""
    if deep:
        return fragments.deep_layout(outer)
    return fragments.wide_layout(2 * numbers.step, outer, numbers.itemsize)


@cache
def copier(numbers: Numbers, layout: Layout, copy_bytes: int, threads: int):
    """copy(shared, pointer, row, rows, column, columns, stride): starts this thread's share of a tile's copies.

    The tile begins at (row, column) of a matrix of `stride` elements a row; what lies past rows, columns is zero.
    """
    plan: CopyPlan = copy_plan(layout, copy_bytes, threads)
    slot_bits, used, size, rows_per_pass, passes, exact = plan
    tile_rows, _, row_bytes, shift, mask = layout
    itemsize = numbers.itemsize
    start = {16: ptx.copy_async_16, 8: ptx.copy_async_8, 4: ptx.copy_async_4}[size]
    width = size // itemsize

    @inlined
    def copy(shared, pointer, row, rows, column, columns, stride):
        slot = fragments.copy_slot(cuda.threadIdx.x, slot_bits)
        at = np.int32(column + slot * width)
        inside = np.int32(fragments.bytes_inside(at, columns, itemsize, size))
        for turn in range(passes):
            r = np.int32(fragments.copy_row(cuda.threadIdx.x, slot_bits, rows_per_pass, turn))
            target = shared + fragments.place(r, slot * size, row_bytes, shift, mask)
            filled = select(np.int32(row + r) < rows, inside, np.int32(0))
            wanted = exact | ((slot < used) & (r < tile_rows))
            start(wanted, target, pointer, np.int64(row) * stride + np.int32(r * stride + at), filled)

    return copy


@cache
def loader_a(numbers: Numbers, layout: Layout, deep: bool, tiles: int):
    """load(registers, shared, row, step): this lane's part of A, `tiles` fragments of 16 rows from `row` on."""
    _, _, row_bytes, shift, mask = layout
    per_chunk, depth = fragments.CHUNK // numbers.itemsize, numbers.step

    @inlined
    def load_deep(registers, shared, row, step):
        lane = cuda.threadIdx.x & 31
        byte = 16 * (2 * step + fragments.a_deep_chunk(lane))
        for i in range(tiles):
            r = row + 16 * i + fragments.a_deep_row(lane)
            ptx.load_matrices_4(registers, 4 * i, shared + fragments.place(r, byte, row_bytes, shift, mask))

    @inlined
    def load_wide_halves(registers, shared, row, step):
        lane = cuda.threadIdx.x & 31
        r = step * depth + fragments.a_wide_row(lane)
        for i in range(tiles):
            byte = 16 * ((row + 16 * i) // per_chunk + fragments.a_wide_chunk(lane))
            ptx.load_matrices_4_transposed(registers, 4 * i, shared + fragments.place(r, byte, row_bytes, shift, mask))

    @inlined
    def load_wide_floats(registers, shared, row, step):
        lane = cuda.threadIdx.x & 31
        for i in range(tiles):
            for j in range(4):
                r = step * depth + fragments.a_depth(lane, j, 1)
                byte = 4 * (row + 16 * i + fragments.a_row(lane, j))
                registers[4 * i + j] = ptx.load_shared_32(shared + fragments.place(r, byte, row_bytes, shift, mask))

    return load_deep if deep else load_wide_halves if numbers.itemsize == 2 else load_wide_floats


@cache
def loader_b(numbers: Numbers, layout: Layout, deep: bool, tiles: int):
    """load(registers, shared, column, step): this lane's part of B, `tiles` fragments of 8 columns from `column` on."""
    _, _, row_bytes, shift, mask = layout
    per_chunk, depth = fragments.CHUNK // numbers.itemsize, numbers.step
    pairs, single = tiles // 2, tiles % 2

    @inlined
    def load_deep(registers, shared, column, step):
        lane = cuda.threadIdx.x & 31
        byte = 16 * (2 * step + fragments.b_deep_chunk(lane))
        for i in range(pairs):
            r = column + 16 * i + fragments.b_deep_row(lane)
            ptx.load_matrices_4(registers, 4 * i, shared + fragments.place(r, byte, row_bytes, shift, mask))
        if single:
            r = column + 16 * pairs + fragments.b_deep_row(lane & 15)
            ptx.load_matrices_2(registers, 4 * pairs, shared + fragments.place(r, byte, row_bytes, shift, mask))

    @inlined
    def load_wide_halves(registers, shared, column, step):
        lane = cuda.threadIdx.x & 31
        r = step * depth + fragments.b_wide_row(lane)
        for i in range(pairs):
            byte = 16 * (column // per_chunk + 2 * i + fragments.b_wide_chunk(lane))
            ptx.load_matrices_4_transposed(registers, 4 * i, shared + fragments.place(r, byte, row_bytes, shift, mask))
        if single:
            byte = 16 * (column // per_chunk + 2 * pairs + fragments.b_wide_chunk(lane & 15))
            ptx.load_matrices_2_transposed(
                registers, 4 * pairs, shared + fragments.place(r, byte, row_bytes, shift, mask)
            )

    @inlined
    def load_wide_floats(registers, shared, column, step):
        lane = cuda.threadIdx.x & 31
        for i in range(tiles):
            byte = 4 * (column + 8 * i + fragments.b_column(lane))
            for j in range(2):
                r = step * depth + fragments.b_depth(lane, j, 1)
                registers[2 * i + j] = ptx.load_shared_32(shared + fragments.place(r, byte, row_bytes, shift, mask))

    return load_deep if deep else load_wide_halves if numbers.itemsize == 2 else load_wide_floats


@cache
def multiplier(numbers: Numbers, row_tiles: int, column_tiles: int):
    """multiply(sums, a, b): sums += a.b for the warp's fragments, one step deep; a and b may be overwritten."""
    if numbers.name == "float32":
        return _multiplier_three_products(row_tiles, column_tiles)
    product = {"tf32": ptx.multiply_tf32, "bfloat16": ptx.multiply_bf16, "float16": ptx.multiply_f16}[numbers.name]
    rounded = numbers.name == "tf32"  # by an instruction of its own: integers, as below, would overflow some NaN

    @inlined
    def round_all(registers, count):
        for i in range(count):
            registers[i] = ptx.round_tf32(ptx.float_of(registers[i]))

    @inlined
    def multiply(sums, a, b):
        if rounded:
            round_all(a, 4 * row_tiles)
            round_all(b, 2 * column_tiles)
        for i in range(row_tiles):
            for j in range(column_tiles):
                product(sums, 4 * (i * column_tiles + j), a, 4 * i, b, 2 * j)

    return multiply


def _multiplier_three_products(row_tiles: int, column_tiles: int):
    """float32 out of TF32: x = high + low, and x*y = high*low + low*high + high*high.

    high is x rounded to TF32's 11 bits, by integer operations since conversions are few a cycle; low is what remains,
    cut off after 11 bits. A NaN whose bits overflow in high is still a NaN in low. What is left out, low*low, is below
    2^-22 of the product, and its sign is as good as random. Tensor cores cut sums off instead of rounding them; so
    every step sums from zero, and ordinary additions, which round, gather the steps.
    Assumes: finite numbers. An infinity has no low part, and its products with low parts of zero make NaN of it.
    Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022.
    """

    a_count = 4 * row_tiles

    @inlined
    def split(registers, first, lows, count):
        for i in range(count):
            value = ptx.float_of(registers[first + i])
            high = np.uint32((registers[first + i] + HALF_UNIT) & TF32_BITS)
            lows[i] = ptx.bits_of(value - ptx.float_of(high)) & TF32_BITS
            registers[first + i] = high

    @inlined
    def multiply(sums, a, b):
        a_low, b_low = cuda.local.array(a_count, types.uint32), cuda.local.array(2, types.uint32)
        part = cuda.local.array(4, types.float32)
        split(a, 0, a_low, a_count)
        for j in range(column_tiles):
            split(b, 2 * j, b_low, 2)
            for i in range(row_tiles):
                for k in range(4):
                    part[k] = np.float32(0)
                ptx.multiply_tf32(part, 0, a_low, 4 * i, b, 2 * j)
                ptx.multiply_tf32(part, 0, a, 4 * i, b_low, 0)
                ptx.multiply_tf32(part, 0, a, 4 * i, b, 2 * j)
                for k in range(4):
                    sums[4 * (i * column_tiles + j) + k] += part[k]

    return multiply


@cache
def storer(itemsize: int, kind: str, row_tiles: int, column_tiles: int, store_bytes: int):
    """store(sums, shared, out, start, row, rows, column, columns): the warp's results, from (row, column) on.

    out[start:] is `[rows,columns]`; `shared` is the warp's own room of 16 rows, through which they pass, so that
    whole chunks are written.
    """
    row_bytes = fragments.spread_bytes(8 * column_tiles, itemsize)
    per_row = 8 * column_tiles * itemsize // store_bytes
    turns = -(-16 * per_row // fragments.WARP)
    width = store_bytes // itemsize
    pack = ptx.pack_bf16 if kind == "bfloat16" else ptx.pack_f16
    halves, wide = itemsize == 2, store_bytes == 16

    @inlined
    def stage(sums, first, target):
        if halves:
            ptx.store_shared_32(target, pack(sums[first], sums[first + 1]))
        else:
            ptx.store_shared_64(target, ptx.bits_of(sums[first]), ptx.bits_of(sums[first + 1]))

    @inlined
    def store(sums, shared, out, start, row, rows, column, columns):
        lane = cuda.threadIdx.x & 31
        chunk = cuda.local.array(4, types.uint32)
        for i in range(row_tiles):
            for j in range(column_tiles):
                for half in range(2):
                    r = fragments.sum_row(lane, 2 * half)
                    c = 8 * j + fragments.sum_column(lane, 0)
                    stage(sums, 4 * (i * column_tiles + j) + 2 * half, shared + r * row_bytes + c * itemsize)
            cuda.syncwarp()
            for turn in range(turns):
                index = lane + fragments.WARP * turn
                r, c = index // per_row, index % per_row
                source = shared + select(index < 16 * per_row, r * row_bytes + c * store_bytes, 0)
                at_row, at = row + 16 * i + r, column + c * width
                wanted = (index < 16 * per_row) & (at_row < rows) & (at < columns)
                if wide:
                    ptx.load_shared_128(chunk, 0, source)
                    ptx.store_global_128(wanted, out, start + at_row * columns + at, chunk, 0)
                else:
                    ptx.store_global_32(wanted, out, start + at_row * columns + at, ptx.load_shared_32(source))
            cuda.syncwarp()

    return store


@cache
def finisher(numbers: Numbers, row_tiles: int, column_tiles: int):
    """finish(sums, bias, has_bias, column, columns, low, high): sums = clamp(sums + bias)."""
    halves = numbers.itemsize == 2
    low_of, high_of = (ptx.low_bf16, ptx.high_bf16) if numbers.name == "bfloat16" else (ptx.low_f16, ptx.high_f16)

    @inlined
    def finish(sums, bias, has_bias, column, columns, low, high):
        lane = cuda.threadIdx.x & 31
        added = cuda.local.array(2, types.float32)
        for j in range(column_tiles):
            c = column + 8 * j + fragments.sum_column(lane, 0)
            wanted = (c < columns) & (has_bias != 0)
            if halves:  # rows of them are even, so that neighbours are inside or outside together
                both = ptx.load_global_32(wanted, bias, c)
                added[0], added[1] = low_of(both), high_of(both)
            else:
                added[0] = ptx.float_of(ptx.load_global_32(wanted, bias, c))
                added[1] = ptx.float_of(ptx.load_global_32(wanted & (c + 1 < columns), bias, c + 1))
            for side in range(2):
                for i in range(row_tiles):
                    for half in range(2):
                        k = 4 * (i * column_tiles + j) + 2 * half + side
                        sums[k] = between(sums[k] + added[side], low, high)

    return finish
