"""Which number lies where: index functions of tensor-core fragments, of tiles in shared memory and of their copies.

Pure integer arithmetic, one text for three readers: Numba inlines it into kernels, Python takes single integers,
NumPy takes arrays with one element a lane or thread. `lane` is the place in a warp of 32, `thread` the one in a block.

A tile in shared memory is made of rows of 16-byte chunks, chunk c of row r standing at place c ^ twist(r) of its row;
twists or distances of rows are such that whatever a warp reads at once falls on different banks.

Source: PTX ISA, fragments of mma.m16n8k8 (tf32) and mma.m16n8k16 (bf16, f16), ldmatrix; CUTLASS for the idea of an
exclusive-or swizzle that serves the copy and the matrix load alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.cuda.extending import overload, register_jitable

CHUNK = 16  # bytes: the widest copy, and a row of a matrix load
WARP = 32

inlined = register_jitable(forceinline=True)


@inlined
def _nothing(state):
    """A step that fills a group."""


def in_turn(steps):
    """run(state): every step on the state, a loop unrolled by hand where the compiler would keep it rolled."""
    while len(steps) > 1:  # groups of four, groups of groups, and so on: few functions to compile
        filled = [*steps, *[_nothing] * (-len(steps) % 4)]
        steps = [_four_in_turn(*filled[i : i + 4]) for i in range(0, len(filled), 4)]
    return steps[0]


def _four_in_turn(first, second, third, fourth):
    @inlined
    def run(state):
        first(state)
        second(state)
        third(state)
        fourth(state)

    return run


def select(condition, chosen, otherwise):
    """`chosen` where the condition holds, else `otherwise`."""
    return np.where(condition, chosen, otherwise)


@overload(select, strict=False, jit_options={"forceinline": True})
def _select(condition, chosen, otherwise):
    return lambda condition, chosen, otherwise: chosen if condition else otherwise


@inlined
def between(value, low, high):
    """`value`, moved to the nearer of two bounds if it lies outside of them; a NaN stays."""
    return select(value < low, low, select(value > high, high, value))


@inlined
def sum_row(lane, register):
    """Row of the 16x8 tile of sums that a lane's register 0 to 3 holds; also that of A's register, row and row + 8."""
    return (lane >> 2) + 8 * (register >> 1)


@inlined
def sum_column(lane, register):
    """Column of the 16x8 tile of sums that a lane's register 0 to 3 holds."""
    return 2 * (lane & 3) + (register & 1)


@inlined
def a_row(lane, register):
    """Row of A that a lane's register 0 to 3 holds, whatever the dtype."""
    return (lane >> 2) + 8 * (register & 1)


@inlined
def a_depth(lane, register, per_register):
    """First of the `per_register` (tf32: 1, half types: 2) places along the depth of A in a lane's register 0 to 3."""
    return per_register * ((lane & 3) + 4 * (register >> 1))


@inlined
def b_column(lane):
    """Column of B that both registers of a lane hold."""
    return lane >> 2


@inlined
def b_depth(lane, register, per_register):
    """First of the `per_register` places along the depth of B in a lane's register 0 or 1."""
    return per_register * ((lane & 3) + 4 * register)


# Addresses for matrix loads: row and chunk, inside the operand's part of the tile, that a lane has to name so that the
# registers are those above. "Deep" tiles have the depth along their rows, "wide" ones along their columns.
@inlined
def a_deep_row(lane):
    """Row of A from a deep tile."""
    return lane & 15


@inlined
def a_deep_chunk(lane):
    """Chunk along the depth, of A from a deep tile."""
    return lane >> 4


@inlined
def a_wide_row(lane):
    """Place along the depth, of A from a wide tile."""
    return (lane & 7) + 8 * (lane >> 4)


@inlined
def a_wide_chunk(lane):
    """Chunk of rows of A from a wide tile."""
    return (lane >> 3) & 1


@inlined
def b_deep_row(lane):
    """Column of B from a deep tile: two fragments of 8."""
    return (lane & 7) + 8 * (lane >> 4)


@inlined
def b_deep_chunk(lane):
    """Chunk along the depth, of B from a deep tile."""
    return (lane >> 3) & 1


@inlined
def b_wide_row(lane):
    """Place along the depth, of B from a wide tile."""
    return lane & 15


@inlined
def b_wide_chunk(lane):
    """Chunk of columns of B from a wide tile: two fragments of 8."""
    return lane >> 4


class Layout(NamedTuple):
    """A tile in shared memory: `rows` rows of `used_bytes`, `row_bytes` apart, twisted by ((row >> shift) & mask)."""

    rows: int
    used_bytes: int
    row_bytes: int
    shift: int
    mask: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


DEEP_BYTES = 64  # a row of a deep tile: two rows share the 32 banks, so that four twists suffice


def deep_layout(rows: int) -> Layout:
    """Rows of 64 bytes along the depth, for matrix loads, without a byte lost."""
    return Layout(rows, DEEP_BYTES, DEEP_BYTES, 1, 3)


def wide_layout(rows: int, columns: int, itemsize: int) -> Layout:
    """Rows across the depth, apart by `spread_bytes`: a lane's addresses differ by constants, and need one register."""
    return Layout(rows, columns * itemsize, spread_bytes(columns, itemsize), 0, 0)


def spread_bytes(columns: int, itemsize: int) -> int:
    """The distance of rows: the least odd multiple of 8 items that holds a row of `columns`, a multiple of 8.

    Then 8 rows of a transposing matrix load (2-byte items), the 4 rows by 8 columns that a warp loads (4-byte items),
    and the 8 rows by 4 pairs of results that a warp stores, all fall on different banks.
    """
    return 8 * itemsize * (columns // 8 | 1)


@inlined
def place(row, byte, row_bytes, shift, mask):
    """Address, inside a tile, of a byte of a row."""
    return row * row_bytes + ((((byte >> 4) ^ ((row >> shift) & mask)) << 4) | (byte & 15))


class CopyPlan(NamedTuple):
    """How a block copies a tile: 2 ** slot_bits threads stand before a row, of which `used` copy `size` bytes each."""

    slot_bits: int
    used: int
    size: int
    rows_per_pass: int
    passes: int
    exact: bool  # every thread of every pass has something to copy


def copy_plan(layout: Layout, size: int, threads: int) -> CopyPlan:
    """The plan for copies of `size` bytes by a block of `threads`, a power of two so that shifts find row and slot."""
    used = layout.used_bytes // size
    slot_bits = (used - 1).bit_length()
    if threads >> slot_bits == 0:
        raise ValueError(f"{threads} threads are too few for a row of {used} copies.")
    rows_per_pass = threads >> slot_bits
    passes = -(-layout.rows // rows_per_pass)
    exact = used == 1 << slot_bits and passes * rows_per_pass == layout.rows
    return CopyPlan(slot_bits, used, size, rows_per_pass, passes, exact)


@inlined
def copy_row(thread, slot_bits, rows_per_pass, turn):
    """Row of the tile that a thread copies to in pass `turn`."""
    return (thread >> slot_bits) + turn * rows_per_pass


@inlined
def copy_slot(thread, slot_bits):
    """Which of the copies of its row a thread makes."""
    return thread & ((1 << slot_bits) - 1)


@inlined
def bytes_inside(position, limit, itemsize, size):
    """How many of `size` bytes from element `position` on lie before element `limit`."""
    return between((limit - position) * itemsize, 0, size)
