"""Sums over many rows, the same bits at every call: parts are summed first, then their sums, in fixed order.

How the rows are split follows from the sizes alone; nothing is added atomically.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import cuda, types

from .elements import ELEMENTS, sums_of
from .launch import Kernel, Stream, made_once
from .memory import Operand, scratch

SHORTEST_PART = 256  # rows; shorter ones would cost more in their own sum than they gain
ENOUGH_THREADS = 2**18  # a card runs some 2**18 at once: more parts would only cost memory


class Split(NamedTuple):
    """Rows in `parts` of `length`, each summed in runs of `run`."""

    parts: int
    length: int
    run: int


def split(rows: int, sums_a_part: int) -> Split:
    """How to split a sum over `rows` rows of which every part makes `sums_a_part` sums."""
    wanted = max(1, min(rows // SHORTEST_PART, ENOUGH_THREADS // sums_a_part))
    length = max(1, -(-rows // wanted))
    return Split(max(1, -(-rows // length)), length, math.isqrt(length))


def over_rows(rows: int, columns: int, x: Operand, total: Operand, stream: Stream) -> None:
    """Fills total `[columns]` with the sums of the columns of x `[rows,columns]`."""
    parts, length, run = split(rows, columns)
    with scratch(parts * columns, sums_of(x.element), stream) as partial:
        kernel = row_sums_kernel(x.element)
        kernel.over(parts * columns, stream, rows, columns, length, run, x.pointer, partial.pointer)
        over_parts(parts, columns, partial, total, stream)


def over_parts(parts: int, columns: int, partial: Operand, total: Operand, stream: Stream) -> None:
    """Fills total `[columns]` with the sums of the columns of partial `[parts,columns]`."""
    kernel = part_sums_kernel(partial.element, total.element)
    kernel.over(columns, stream, parts, columns, math.isqrt(parts), partial.pointer, total.pointer)


@made_once
def row_sums_kernel(x_element: str) -> Kernel:
    """The first stage, for rows of this element."""
    load = ELEMENTS[x_element].load
    sums_element = sums_of(x_element)
    accumulator = getattr(np, sums_element)

    def row_sums(rows, columns, length, run, x, partial):
        """partial[part,column] = sum over the part's rows of x[row,column]

        x `[rows,columns]`, partial `[parts,columns]`; a part is `length` rows, summed in runs of `run`.
        Parallel over: the elements of partial. Assumes: parts * length reaches the number of rows.
        """
        count = (rows + length - 1) // length * columns if rows > 0 else columns
        i = cuda.grid(1)
        while i < count:
            column, first = i % columns, i // columns * length
            last = min(first + length, rows)
            total = accumulator(0)
            for start in range(first, last, run):
                short = accumulator(0)
                for row in range(start, min(start + run, last)):
                    short += load(x, row * columns + column)
                total += short
            partial[i] = total
            i += cuda.gridsize(1)

    pointers = ELEMENTS[x_element].pointer, ELEMENTS[sums_element].pointer
    return Kernel(row_sums, (x_element,), (*[types.int64] * 4, *pointers))


@made_once
def part_sums_kernel(partial_element: str, total_element: str) -> Kernel:
    """The second stage, to a total of this element."""
    store, accumulator = ELEMENTS[total_element].store, getattr(np, partial_element)

    def part_sums(parts, columns, run, partial, total):
        """total[column] = sum over the parts of partial[part,column], in runs of `run` parts

        partial `[parts,columns]`, total `[columns]`.
        Parallel over: the elements of total. Assumes: at least one part.
        """
        column = cuda.grid(1)
        while column < columns:
            long = accumulator(0)
            for start in range(0, parts, run):
                short = accumulator(0)
                for part in range(start, min(start + run, parts)):
                    short += partial[part * columns + column]
                long += short
            store(total, column, long)
            column += cuda.gridsize(1)

    pointers = ELEMENTS[partial_element].pointer, ELEMENTS[total_element].pointer
    return Kernel(part_sums, (partial_element, total_element), (*[types.int64] * 3, *pointers))
