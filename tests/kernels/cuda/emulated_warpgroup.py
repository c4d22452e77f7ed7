"""The products of Hopper's warpgroups in the emulation: operands read from shared memory as their descriptors say.

Products run beside the threads. So what they read stays watched until it is waited for: nothing may overwrite it, and
what they read must have been shown to them by a fence, with a barrier after it. Sums are NaN until they are waited for.
"""

from __future__ import annotations

import numpy as np

from tests.kernels.cuda.emulated_memory import BASE, WARP

WARPGROUP, ROWS, DEPTH_BYTES = 128, 64, 32  # threads; of one product


def fields(descriptor: int) -> dict[str, int]:
    """What the bits of a descriptor say, by the ISA's table."""
    in_bytes = {
        name: (descriptor >> bit & 0x3FFF) << 4 for name, bit in (("start", 0), ("leading", 16), ("stride", 32))
    }
    return {**in_bytes, "base": descriptor >> 49 & 7, "swizzle": descriptor >> 62}


def addresses(descriptor: int, outer: int, wide: bool, itemsize: int = 2) -> np.ndarray:
    """Where the element (row of A or column of B, place of the depth) of an operand lies: `[outer,depth]`.

    By the ISA's canonical layouts of 128-byte swizzle: atoms of 8 rows of 128 bytes, bits 4 to 6 of an address crossed
    with bits 7 to 9.
    """
    told = fields(descriptor)
    assert told["swizzle"] == 1, "not the swizzle of 128 bytes"
    assert told["base"] == 0, "an atom off its period"
    i, k = np.arange(outer)[:, None], np.arange(DEPTH_BYTES // itemsize)[None, :]
    if wide:
        assert itemsize == 2, "the instruction transposes half numbers alone"
        linear = i // 64 * told["leading"] + i % 64 * 2 + k // 8 * told["stride"] + k % 8 * 128
    else:
        linear = i // 8 * told["stride"] + i % 8 * 128 + k * itemsize
    linear = linear + told["start"]
    return linear ^ (linear >> 7 & 7) << 4


def sum_places(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each sum: `[registers,128 threads]`, by the ISA's figure of the accumulator."""
    register, thread = np.arange(columns // 2)[:, None], np.arange(WARPGROUP)[None, :]
    rows = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    return rows, register // 4 * 8 + thread % 4 * 2 + register % 2


def toward_zero(exact: np.ndarray) -> np.ndarray:
    """float64 to float32 with the rest cut off, as tensor cores do with their sums."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = exact.astype(np.float32)
        return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


DECODE = {  # bits as they lie in memory, and the numbers that are multiplied
    "bf16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
    "f16": lambda bits: bits.view(np.float16),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),  # cut off: ISA, wgmma, "lower 13 bits"
}


class WarpgroupInstructions:
    """The functions of `ptx` that start products of warpgroups and wait for them."""

    def __init__(self, block):
        self._block, self._shared = block, block.shared
        self._fenced = False
        self._started: list[tuple] = []  # (words read, warpgroup), of products without a group yet
        self._groups: list[list[tuple]] = []
        self._running: dict[int, np.ndarray] = {}  # sums by the first register

    def fence_shared(self):
        self._shared.show()

    def fence_products(self):
        self._fenced = True

    def multiply_by_warpgroup(self, kind, columns, a_wide, b_wide):
        decode, dtype = DECODE[kind], np.uint32 if kind == "tf32" else np.uint16

        def multiply(sums, i, a, b):
            assert self._fenced, "products of sums that no fence ordered"
            a, b = (self._block.each(value, np.uint64).reshape(-1, WARPGROUP) for value in (a, b))
            before = self._running.get(i)
            before = (sums.rows[i : i + columns // 2] if before is None else before).reshape(-1, len(a), WARPGROUP)
            after = np.empty_like(before)
            rows, places = sum_places(columns)
            for group in range(len(a)):
                left = decode(self._read(a[group], ROWS, a_wide, dtype, group)).astype(np.float64)
                right = decode(self._read(b[group], columns, b_wide, dtype, group)).astype(np.float64)
                with np.errstate(invalid="ignore"):
                    product = left @ right.T
                after[:, group] = toward_zero(before[:, group].astype(np.float64) + product[rows, places])
            self._running[i] = after.reshape(len(after), -1)
            sums.rows[i : i + columns // 2] = np.nan

        return multiply

    def _read(self, descriptors, outer, wide, dtype, group):
        assert (descriptors == descriptors[0]).all(), "threads of a warpgroup name different operands"
        itemsize = np.dtype(dtype).itemsize
        at = addresses(int(descriptors[0]), outer, wide, itemsize) - BASE
        assert at.min() >= 0 and at.max() + itemsize <= self._shared.bytes.size, "past shared memory"
        words = np.unique(at // 4)
        self._shared.note_product(words)
        self._started.append((words, group))
        return self._shared.bytes.view(dtype)[at // itemsize]

    def commit_products(self):
        self._groups.append(self._started)
        self._started = []

    def _wait(self, groups):
        done = self._groups[: len(self._groups) - groups]
        self._groups = self._groups[len(done) :]
        for words, group in [read for each in done for read in each]:
            warps = np.arange(WARPGROUP // WARP) + group * (WARPGROUP // WARP)
            self._shared.note_product_done(words, warps)

    def wait_all_products_but_one_group(self):
        self._wait(1)

    def wait_products(self, count):
        def wait(sums, i):
            self._wait(0)
            sums.rows[i : i + count] = self._running.pop(i)
            self._fenced = False

        return wait

    def _assert_done(self):
        assert not self._started and not self._groups and not self._running, "products left under way"
