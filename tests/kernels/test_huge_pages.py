"""Of large blocks large pages are asked for; of small ones, and of what lies around, they are not."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from fastsepconv.kernels.cpu.huge_pages import LEAST_BYTES, ask_for_huge_pages
from tests.mappings import advised, wants_huge_pages

PAGE = mmap.PAGESIZE


@wants_huge_pages
@pytest.mark.parametrize(
    ("size", "asked"), [(LEAST_BYTES - 1, False), (LEAST_BYTES, True), (LEAST_BYTES + PAGE // 2, True), (0, False)]
)
def test_large_blocks_alone(size, asked):
    with mmap.mmap(-1, LEAST_BYTES + 4 * PAGE) as memory:
        start = ctypes.addressof(anchor := ctypes.c_char.from_buffer(memory))
        del anchor
        block = start + PAGE + 64
        ask_for_huge_pages(block, size)
        end = (block + size) // PAGE * PAGE  # of the last page that is the block's alone
        assert [advised(address) for address in (start + 2 * PAGE, end - 1)] == [asked] * 2
        assert [advised(address) for address in (start + PAGE, end)] == [False] * 2
