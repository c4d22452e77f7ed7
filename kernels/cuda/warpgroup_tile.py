"""A block's share of a matrix product on Hopper's tensor cores, which read both operands from shared memory themselves.

A warpgroup, four warps of a block, multiplies 64 rows of A by all columns of the tile, 32 bytes deep, by one
instruction that runs beside its threads. Where the operands lie it is told by descriptors. What of that has run on a
card, the README tells.

An operand stands in shared memory in panels, of rows of 128 bytes that begin on 1024, chunk c of row r at place
c ^ (r & 7): the instruction's "128-byte swizzle". A stage is 128 bytes deep, 64 half numbers or 32 floats. Of a `deep`
operand, whose depth runs along its rows, it is one panel with a row for each row of A or column of B; of a `wide` one,
which only half numbers may be, panels of 64 rows of A or columns of B side by side, with a row for each place of the
depth.

As TF32 the instruction reads the first 19 bits of a float32 and drops the others. So an element that comes as it is in
memory, of x forward, of dy and w for d_x, is cut off: by up to 2^-10 of itself and always towards zero, where rounding
errs by 2^-11 to either side. Each factor cut off takes 0.7 * 2^-11 of a product on average, which sums keep; the most
that a sum can be off is 1.5 * 2^-10 of the sum of its products' magnitudes forward and 2^-9 in d_x, where rounding both
factors makes it 2^-10. A NaN that only dropped bits tell from an infinity becomes one.

Source: PTX ISA, wgmma.mma_async, its matrix descriptor and canonical layouts; CUTLASS 3, the same layouts in CuTe.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda

from . import gemm_tile, ptx
from .fragments import Layout, inlined
from .gemm_tile import Numbers
from .tiles import GemmTile

WARPGROUP = 128  # threads
GROUP_ROWS = 64  # of A, that a warpgroup multiplies
PANEL_BYTES = 128  # a row of a panel
PANEL_HALVES = 64  # half numbers that fill it
STEPS = 4  # products that a stage takes, each 32 bytes deep
PERIOD = 1024  # bytes after which the twist of chunks comes again, and on which panels begin
SWIZZLE_128 = np.uint64(1 << 62)
KINDS = {"bfloat16": "bf16", "float16": "f16", "tf32": "tf32"}


def panels(deep: bool, outer: int) -> tuple[int, Layout]:
    """How many panels a stage of an operand has with `outer` rows (of A) or columns (of B), and each one's layout."""
    count, rows = (1, outer) if deep else (outer // PANEL_HALVES, PANEL_HALVES)
    return count, Layout(rows, PANEL_BYTES, PANEL_BYTES, 0, 7)


def stage_bytes(deep: bool, outer: int) -> int:
    """Shared memory of a stage of an operand."""
    count, layout = panels(deep, outer)
    return count * layout.bytes


def shared_bytes(tile: GemmTile, a_deep: bool, b_deep: bool) -> int:
    """Dynamic shared memory of the stages, and what aligning their beginning may take."""
    return PERIOD + tile.stages * (stage_bytes(a_deep, tile.rows) + stage_bytes(b_deep, tile.columns))


@inlined
def aligned(address):
    """The next address on which panels may begin."""
    return (address + np.uint32(PERIOD - 1)) & np.uint32(2**32 - PERIOD)


@inlined
def descriptor(address, leading):
    """What a product is told of an operand that begins at a shared address; `leading` is its `leading_bytes`.

    From bit 0 on the address, from bit 16 the distance of panels, from bit 32 that of groups of 8 rows of a panel, all
    counted in 16 bytes; in bits 62 and 63 the swizzle.
    """
    distances = SWIZZLE_128 | np.uint64(PERIOD >> 4) << np.uint64(32) | np.uint64(leading >> 4) << np.uint64(16)
    return distances | np.uint64((address & np.uint32(0x3FFFF)) >> np.uint32(4))


def leading_bytes(deep: bool) -> int:
    """The distance of an operand's panels, or what stands for it where there is only one."""
    return 16 if deep else PANEL_HALVES * PANEL_BYTES


def step_units(deep: bool) -> int:
    """How far a step along the depth is, in a descriptor's units: 32 bytes of each row, or 16 rows."""
    return 2 if deep else 16 * PANEL_BYTES >> 4


@cache
def stage_copier(numbers: Numbers, tile: GemmTile, deep: bool, outer: int):
    """copy(shared, pointer, first, limit, depth, last, stride): starts this thread's copies of an operand's stage.

    `first` is its first row of A or column of B; what lies past `limit` or, along the depth, past `last` is zero.
    """
    count, layout = panels(deep, outer)
    copy_panel, size = gemm_tile.copier(numbers, layout, tile.copy_bytes, tile.threads), layout.bytes

    @inlined
    def copy_deep(shared, pointer, first, limit, depth, last, stride):
        copy_panel(shared, pointer, first, limit, depth, last, stride)

    @inlined
    def copy_wide(shared, pointer, first, limit, depth, last, stride):
        for i in range(count):
            copy_panel(shared + i * size, pointer, depth, last, first + i * PANEL_HALVES, limit, stride)

    return copy_deep if deep else copy_wide


@cache
def stage_multiplier(numbers: Numbers, tile: GemmTile, a_deep: bool, b_deep: bool):
    """multiply(sums, shared): starts the products of a stage for this warpgroup's rows, as one group."""
    kind = KINDS[numbers.name]
    product = ptx.multiply_by_warpgroup(kind, tile.columns, not a_deep, not b_deep)
    a_step, b_step = np.uint64(step_units(a_deep)), np.uint64(step_units(b_deep))
    a_leading, b_leading = leading_bytes(a_deep), leading_bytes(b_deep)
    b_start = stage_bytes(a_deep, tile.rows)
    group_bytes = GROUP_ROWS * PANEL_BYTES  # deep: 64 rows of the panel; wide: a panel of 64 rows of A

    @inlined
    def multiply(sums, shared):
        group = cuda.threadIdx.x // WARPGROUP
        a = descriptor(np.uint32(shared + group * group_bytes), a_leading)
        b = descriptor(np.uint32(shared + b_start), b_leading)
        ptx.fence_products()
        for step in range(STEPS):
            product(sums, 0, a + np.uint64(step) * a_step, b + np.uint64(step) * b_step)
        ptx.commit_products()

    return multiply


@cache
def accumulator(numbers: Numbers, tile: GemmTile, a_deep: bool, b_deep: bool):
    """accumulate(sums, a, b, row, rows, column, columns, depth, last, a_stride, b_stride)

    sums += A[row:, depth:last] . B[depth:last, column:] for this warpgroup's rows of the block's tile.

    Of the ring of stages one is read by the present products and one by those before, which still run; the others
    are filled. So products follow each other without a pause while threads start copies.
    """
    copy_a = stage_copier(numbers, tile, a_deep, tile.rows)
    copy_b = stage_copier(numbers, tile, b_deep, tile.columns)
    multiply = stage_multiplier(numbers, tile, a_deep, b_deep)
    wait_for_sums = ptx.wait_products(tile.sums)
    a_bytes = stage_bytes(a_deep, tile.rows)
    size = a_bytes + stage_bytes(b_deep, tile.columns)
    stages, ahead, in_flight = tile.stages, tile.stages - 2, tile.stages - 3
    stage_depth = PANEL_BYTES // numbers.itemsize

    @inlined
    def copy_stage(shared, a, b, row, rows, column, columns, depth, last, a_stride, b_stride):
        copy_a(shared, a, row, rows, depth, last, a_stride)
        copy_b(shared + a_bytes, b, column, columns, depth, last, b_stride)

    @inlined
    def accumulate(sums, a, b, row, rows, column, columns, depth, last, a_stride, b_stride):
        start = aligned(ptx.shared_memory())
        for stage in range(ahead):
            copy_stage(
                start + stage * size,
                a, b, row, rows, column, columns, depth + stage * stage_depth, last, a_stride, b_stride,
            )  # fmt: skip
            ptx.commit_copies()
        reading, writing = start, np.uint32(start + ahead * size)
        end = np.uint32(start + stages * size)
        for at in range(depth, last, stage_depth):
            ptx.wait_copies(in_flight)
            ptx.fence_shared()
            cuda.syncthreads()
            multiply(sums, reading)
            later = np.int32(at + ahead * stage_depth)
            if later < last:
                copy_stage(writing, a, b, row, rows, column, columns, later, last, a_stride, b_stride)
            ptx.commit_copies()
            ptx.wait_all_products_but_one_group()
            reading = np.uint32(reading + size)
            writing = np.uint32(writing + size)
            if reading == end:
                reading = start
            if writing == end:
                writing = start
        wait_for_sums(sums, 0)
        ptx.wait_copies(0)
        cuda.syncthreads()

    return accumulate
