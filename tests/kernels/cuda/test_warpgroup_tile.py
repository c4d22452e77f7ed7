"""The tiles of Hopper's warpgroups: where operands lie against where descriptors say, deep products, and races.

What the PTX ISA says of descriptors, swizzles and sums is written out in `emulated_warpgroup` once more.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

from fastsepconv.kernels.cuda import fragments, pointwise_tensor, tiles, warpgroup_tile
from tests.kernels.cuda import emulated_memory, emulated_warpgroup, emulator
from tests.kernels.cuda.test_fast_kernels import (
    INNER_LOOP,
    MODULES,
    assert_close,
    assert_watched,
    poisoned,
    rounded_tf32,
    stored,
    taken,
    valued,
)

TILES = [
    pytest.param(dtype, tile, id=f"{dtype}-{tile.name}")
    for dtype, found in tiles.WARPGROUP_POINTWISE.items()
    for tile in found
]
HALF_TILES = [case for case in TILES if case.values[0] != "tf32"]
SMALLEST = tiles.WARPGROUP_POINTWISE["bfloat16"][-1]
START = np.uint32(7 * warpgroup_tile.PERIOD)


def test_a_descriptor_holds_the_fields_of_the_instruction_set():
    for address, leading in itertools.product((0, 1024, 230400, 2**18 + 1024), (8192, 16)):
        told = emulated_warpgroup.fields(int(warpgroup_tile.descriptor(np.uint32(address), leading)))
        expected = {"start": address % 2**18, "leading": leading, "stride": 1024, "base": 0, "swizzle": 1}
        assert told == expected
    both = warpgroup_tile.descriptor(np.array([1024, 2048], np.uint32), 8192)
    assert both.tolist() == [int(warpgroup_tile.descriptor(np.uint32(a), 8192)) for a in (1024, 2048)]


@pytest.mark.parametrize("outer", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("deep", "itemsize"), [(True, 2), (False, 2), (True, 4)], ids=["deep halves", "wide halves", "deep floats"]
)
def test_products_read_every_element_where_the_copies_put_it(deep, itemsize, outer):
    count, layout = warpgroup_tile.panels(deep, outer)
    assert count * layout.bytes == warpgroup_tile.stage_bytes(deep, outer) == outer * 128
    first = warpgroup_tile.descriptor(START, warpgroup_tile.leading_bytes(deep))
    depth = 32 // itemsize
    for step in range(warpgroup_tile.STEPS):
        at = int(first) + step * warpgroup_tile.step_units(deep)
        read = emulated_warpgroup.addresses(at, outer, not deep, itemsize)
        i, k = np.arange(outer)[:, None], np.arange(depth)[None, :] + depth * step
        panel, row, byte = (0, i, itemsize * k) if deep else (i // 64, k, 2 * (i % 64))
        assert np.array_equal(read, START + panel * layout.bytes + fragments.place(row, byte, *layout[2:]))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "wide"])
def test_the_second_warpgroup_reads_its_own_rows_of_a(deep):
    rows = 2 * warpgroup_tile.GROUP_ROWS
    leading = warpgroup_tile.leading_bytes(deep)
    both = emulated_warpgroup.addresses(int(warpgroup_tile.descriptor(START, leading)), rows, not deep)
    start = START + warpgroup_tile.GROUP_ROWS * warpgroup_tile.PANEL_BYTES
    alone = emulated_warpgroup.addresses(int(warpgroup_tile.descriptor(start, leading)), rows // 2, not deep)
    assert np.array_equal(both[rows // 2 :], alone)


@pytest.mark.parametrize("columns", [128, 192, 256])
def test_sums_lie_as_those_of_a_warp_that_takes_sixteen_rows(columns):
    """So that the warps' own epilogues serve."""
    rows, places = emulated_warpgroup.sum_places(columns)
    thread, register = np.arange(128)[None, :], np.arange(columns // 2)[:, None]
    assert np.array_equal(rows, 16 * (thread // 32) + fragments.sum_row(thread % 32, register % 4))
    assert np.array_equal(places, 8 * (register // 4) + fragments.sum_column(thread % 32, register % 4))
    assert np.unique(rows * columns + places).size == 64 * columns


def test_panels_begin_on_their_period():
    for address in (0, 16, 1024, 1040, 2047):
        start = warpgroup_tile.aligned(np.uint32(address))
        assert start % 1024 == 0
        assert 0 <= start - address < 1024


def forward(rng, dtype, tile, rows, columns, depth):
    x, w, bias = (stored(rng.standard_normal(shape), dtype) for shape in ((rows, depth), (depth, columns), (columns,)))
    y, bounds = poisoned((rows, columns), dtype), (np.float32(-30), np.float32(50))
    arguments = (x, taken(w, dtype, tile), bias, y, rows, columns, depth, 1, *bounds)
    watched = emulator.run(MODULES, pointwise_tensor.forward, (dtype, tile), (rows, columns), arguments)
    exact = valued(x, dtype) @ valued(w, dtype) + valued(bias, dtype)
    assert_close("y", valued(y, dtype), exact.clip(*bounds), dtype)
    return watched


@pytest.mark.parametrize("chunks", [1, 8, 91])  # of 16 bytes
@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_forward_from_one_stage_to_rings_of_them(dtype, tile, chunks, rng):
    watched = forward(rng, dtype, tile, 70, 88, chunks * 16 // tiles.ITEMSIZE[dtype])
    assert_watched(watched, free_of_conflicts=INNER_LOOP)


@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_input_gradient_over_a_ring_of_stages(dtype, tile, rng):
    rows, channels, filters = 40, 136, 456
    dy, w = (stored(rng.standard_normal(shape), dtype) for shape in ((rows, filters), (channels, filters)))
    dx = poisoned((rows, channels), dtype)
    arguments = (dy, w, dx, rows, channels, filters)
    watched = emulator.run(MODULES, pointwise_tensor.input_gradient, (dtype, tile), (rows, channels), arguments)
    assert_close("d_x", valued(dx, dtype), valued(dy, dtype) @ valued(w, dtype).T, dtype)
    assert_watched(watched, free_of_conflicts=INNER_LOOP)


@pytest.mark.parametrize(("dtype", "tile"), HALF_TILES)
def test_kernel_gradient_over_a_ring_of_stages(dtype, tile, rng):
    depth, rows, columns, share = 850, 136, 72, 416
    x, dy = (stored(rng.standard_normal(shape), dtype) for shape in ((depth, rows), (depth, columns)))
    partials = np.full((3, rows, columns), np.nan, np.float32)
    arguments = (x, dy, partials, rows, columns, depth, share)
    sizes = (rows, columns, depth, share)
    watched = emulator.run(MODULES, pointwise_tensor.kernel_gradient, (dtype, tile), sizes, arguments)
    exact = valued(x, dtype).T @ valued(dy, dtype)
    assert_close("d_kernel", partials.sum(0, dtype=np.float64), exact, "float32")
    assert_watched(watched, free_of_conflicts=INNER_LOOP)


def test_tf32_of_what_is_not_rounded_is_cut_off(rng):
    """By up to 2^-10 of a number, towards zero; products of x by rounded numbers are else exact here."""
    x, depth = rng.uniform(1, 2, (64, 32)).astype(np.float32), 32
    x[::2] *= -1
    x[5] *= np.float32(2) ** 90
    y, w = poisoned((64, 32), "tf32"), np.eye(32, dtype=np.float32)
    bounds = np.float32(-np.inf), np.float32(np.inf)
    arguments = (x, w, np.zeros(32, np.float32), y, 64, 32, depth, 0, *bounds)
    emulator.run(MODULES, pointwise_tensor.forward, ("tf32", SMALLEST), (64, 32), arguments)
    np.testing.assert_array_equal(y, (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32))
    lost = 1 - y.astype(np.float64) / x
    assert lost.min() >= 0 and 2**-11 < lost.max() < 2**-10
    assert 0.6 * 2**-11 < lost.mean() < 0.8 * 2**-11
    assert np.abs(1 - rounded_tf32(x).astype(np.float64) / x).max() <= 2**-11


def test_tf32_has_no_product_of_operands_whose_depth_runs_across_their_rows():
    with pytest.raises(ValueError, match="transpose no TF32"):
        pointwise_tensor.kernel_gradient("tf32", SMALLEST)
    assert pointwise_tensor.kernel_gradient not in pointwise_tensor.factories("tf32", SMALLEST)


DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])


def small(rng, dtype):
    """A product of several stages, of as many bytes whatever the dtype."""
    forward(rng, dtype, SMALLEST, 16, 16, 528 // tiles.ITEMSIZE[dtype])


@DTYPES
def test_shared_memory_may_begin_anywhere_on_sixteen_bytes(dtype, rng, monkeypatch):
    for module in (emulator, emulated_memory, emulated_warpgroup):
        monkeypatch.setattr(module, "BASE", 1040)
    small(rng, dtype)


INSTRUCTIONS = emulator.Instructions
RACES = {
    "no fence before products of what was copied": ("fence_shared", "no fence showed"),
    "no fence before products of what was summed": ("fence_products", "no fence ordered"),
}


@DTYPES
@pytest.mark.parametrize(("instruction", "told"), RACES.values(), ids=RACES.keys())
def test_the_emulation_notices_a_lacking_fence(instruction, told, dtype, rng, monkeypatch):
    monkeypatch.setattr(INSTRUCTIONS, instruction, lambda self: None)
    with pytest.raises(AssertionError, match=told):
        small(rng, dtype)


@DTYPES
def test_the_emulation_notices_a_lacking_barrier(dtype, rng, monkeypatch):
    monkeypatch.setattr(emulated_memory.SharedMemory, "barrier", lambda self: None)
    with pytest.raises(AssertionError, match="no barrier after the fence"):
        small(rng, dtype)


@DTYPES
def test_the_emulation_notices_copies_over_what_products_read(dtype, rng, monkeypatch):
    monkeypatch.setattr(INSTRUCTIONS, "wait_all_products_but_one_group", lambda self: self._wait(2))
    with pytest.raises(AssertionError, match="products under way may read"):
        small(rng, dtype)


@DTYPES
def test_the_emulation_notices_products_of_copies_under_way(dtype, rng, monkeypatch):
    wait = INSTRUCTIONS.wait_copies
    monkeypatch.setattr(INSTRUCTIONS, "wait_copies", lambda self, groups: wait(self, groups + 1))
    with pytest.raises(AssertionError, match="products under way may read"):
        small(rng, dtype)


@DTYPES
def test_the_emulation_notices_sums_that_were_not_waited_for(dtype, rng, monkeypatch):
    monkeypatch.setattr(INSTRUCTIONS, "wait_products", lambda self, count: lambda sums, i: None)
    with pytest.raises(AssertionError, match="overwrote what products under way may read"):
        small(rng, dtype)
