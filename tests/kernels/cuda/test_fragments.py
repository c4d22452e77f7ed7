"""The index functions of the fast kernels by themselves, and the emulation that the kernels are run on.

What the PTX ISA says of fragments is written out here once more, as tables of one lane's elements.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

from fastsepconv.kernels.cuda import fragments, gemm_tile, pointwise_tensor, tiles
from tests.kernels.cuda import emulated_memory, emulated_warpgroup, emulator
from tests.kernels.cuda.test_fast_kernels import MODULES, poisoned, stored

LANES = np.arange(32)
LAYOUTS = {
    (dtype, tile.name, operand, deep): (gemm_tile.operand_layout(gemm_tile.NUMBERS[dtype], deep, outer), tile)
    for dtype, found in tiles.POINTWISE.items()
    for tile in found
    for operand, outer in (("a", tile.rows), ("b", tile.columns))
    for deep in (True, False)
}


@pytest.mark.parametrize("per_register", [1, 2])
def test_fragments_are_those_of_the_instruction_set(per_register):
    for lane in range(32):
        group, place = divmod(lane, 4)
        first, half = per_register * place, 4 * per_register
        a = [(group, first), (group + 8, first), (group, first + half), (group + 8, first + half)]
        b = [(first, group), (first + half, group)]
        sums = [(group, 2 * place), (group, 2 * place + 1), (group + 8, 2 * place), (group + 8, 2 * place + 1)]
        assert [(fragments.a_row(lane, i), fragments.a_depth(lane, i, per_register)) for i in range(4)] == a
        assert [(fragments.b_depth(lane, i, per_register), fragments.b_column(lane)) for i in range(2)] == b
        assert [(fragments.sum_row(lane, i), fragments.sum_column(lane, i)) for i in range(4)] == sums


def test_arrays_and_integers_give_the_same():
    layout = fragments.deep_layout(64)
    places = fragments.place(LANES, 48, *layout[2:])
    assert places.tolist() == [fragments.place(lane, 48, *layout[2:]) for lane in range(32)]
    assert fragments.bytes_inside(LANES, 20, 2, 16).tolist() == [min(max(2 * (20 - i), 0), 16) for i in range(32)]
    assert np.isnan(fragments.between(np.float32(np.nan), np.float32(0), np.float32(6)))


@pytest.mark.parametrize(
    ("row", "chunk", "matrices"),
    [
        (fragments.a_deep_row, fragments.a_deep_chunk, [(0, 0), (8, 0), (0, 1), (8, 1)]),
        (fragments.a_wide_row, fragments.a_wide_chunk, [(0, 0), (0, 1), (8, 0), (8, 1)]),
        (fragments.b_deep_row, fragments.b_deep_chunk, [(0, 0), (0, 1), (8, 0), (8, 1)]),
        (fragments.b_wide_row, fragments.b_wide_chunk, [(0, 0), (8, 0), (0, 1), (8, 1)]),
    ],
    ids=["a-deep", "a-wide", "b-deep", "b-wide"],
)
def test_lanes_name_the_rows_of_the_matrices_in_the_order_of_the_registers(row, chunk, matrices):
    expected = [(first + i, column) for first, column in matrices for i in range(8)]
    assert list(zip(row(LANES).tolist(), chunk(LANES).tolist(), strict=True)) == expected


@pytest.mark.parametrize("key", LAYOUTS, ids=lambda key: "-".join(map(str, key)))
def test_a_tile_keeps_every_byte_at_a_place_of_its_own(key):
    layout, _ = LAYOUTS[key]
    rows, used, *twist = layout
    places = fragments.place(np.arange(rows)[:, None], np.arange(used), *twist)
    assert np.unique(places).size == rows * used
    assert places.min() >= 0
    assert places.max() < layout.bytes


@pytest.mark.parametrize("key", LAYOUTS, ids=lambda key: "-".join(map(str, key)))
@pytest.mark.parametrize("inside", [(5, 3), (1000, 1000)], ids=["ragged", "whole"])
def test_copies_cover_a_tile_once_and_read_nothing_outside(key, inside):
    (layout, tile), itemsize = LAYOUTS[key], tiles.ITEMSIZE[key[0]]
    plan, threads = fragments.copy_plan(layout, tile.copy_bytes, tile.threads), np.arange(tile.threads)
    covered = np.zeros((layout.rows, layout.used_bytes), int)
    for turn in range(plan.passes):
        rows = fragments.copy_row(threads, plan.slot_bits, plan.rows_per_pass, turn)
        slots = fragments.copy_slot(threads, plan.slot_bits)
        wanted = (slots < plan.used) & (rows < layout.rows)
        assert wanted.all() or not plan.exact
        sizes = fragments.bytes_inside(slots * plan.size // itemsize, inside[1], itemsize, plan.size)
        assert (slots * plan.size + sizes <= inside[1] * itemsize)[sizes > 0].all()
        for row, slot in zip(rows[wanted], slots[wanted], strict=True):
            covered[row, slot * plan.size : (slot + 1) * plan.size] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("columns", range(8, 264, 8))
def test_spread_rows_fall_on_different_banks(columns):
    for itemsize, rows in ((2, np.arange(8)), (4, np.arange(4))):
        distance = fragments.spread_bytes(columns, itemsize)
        assert columns * itemsize <= distance < (columns + 16) * itemsize
        width = 4 if itemsize == 2 else 8  # words that a row gives
        banks = (rows[:, None] * distance // 4 + np.arange(width)) % 32
        assert np.unique(banks).size == banks.size


def run_small(rng, dtype="bfloat16"):
    """One tile's forward product, more than all stages deep, and the largest error."""
    tile = tiles.POINTWISE[dtype][2]
    x, w = (stored(rng.standard_normal(shape), dtype) for shape in ((64, 264), (264, 64)))
    y, infinity = poisoned((64, 64), dtype), np.float32(np.inf)
    arguments = (x, w, np.zeros(64, x.dtype), y, 64, 64, 264, 0, -infinity, infinity)
    emulator.run(MODULES, pointwise_tensor.forward, (dtype, tile), (64, 64), arguments)
    return y


def test_the_emulation_notices_a_lacking_barrier_of_the_block(rng, monkeypatch):
    run_small(rng)
    monkeypatch.setattr(emulated_memory.SharedMemory, "barrier", lambda self: None)
    with pytest.raises(AssertionError, match="no barrier between"):
        run_small(rng)


def test_the_emulation_notices_a_lacking_barrier_of_the_warp(rng, monkeypatch):
    monkeypatch.setattr(emulated_memory.SharedMemory, "warp_barrier", lambda self: None)
    with pytest.raises(AssertionError, match="no barrier between"):
        run_small(rng)


def test_the_emulation_notices_a_wait_for_too_few_copies(rng, monkeypatch):
    wait = emulator.Instructions.wait_copies
    monkeypatch.setattr(emulator.Instructions, "wait_copies", lambda self, groups: wait(self, groups + 1))
    with pytest.raises(AssertionError, match="no barrier between"):
        run_small(rng)


def test_the_emulation_sees_a_read_past_an_array(rng, monkeypatch):
    monkeypatch.setattr(fragments, "bytes_inside", lambda position, limit, itemsize, size: size)
    with pytest.raises(AssertionError, match="past an array"):
        run_small(rng)


def test_the_emulation_counts_colliding_banks():
    shared = emulated_memory.SharedMemory(8192, 32)
    for stride, passes in ((4, 1), (8, 2), (128, 32)):
        shared.conflicts.clear()
        shared.count_conflicts("load32", emulated_memory.BASE + stride * LANES, LANES, 4)
        assert shared.conflicts["load32"] == passes - 1
    for stride, passes in ((16, 1), (32, 2), (128, 8), (0, 1)):
        shared.conflicts.clear()
        shared.count_conflicts("matrix", emulated_memory.BASE + stride * LANES[:8], LANES[:8], 16)
        assert shared.conflicts["matrix"] == passes - 1


def test_the_emulation_cuts_sums_off_toward_zero():
    exact = np.array([1 + 2.0**-24, -(1 + 2.0**-24), 1 + 1.5 * 2.0**-23, 0.0, np.inf])
    assert emulated_warpgroup.toward_zero(exact).tolist() == [1.0, -1.0, 1 + 2.0**-23, 0.0, np.inf]
