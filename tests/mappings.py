"""What Linux tells of this process's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

MAPPINGS = Path("/proc/self/smaps")


def _tells_of_huge_pages() -> bool:
    return Path("/sys/kernel/mm/transparent_hugepage").exists() and "VmFlags:" in MAPPINGS.read_text()


wants_huge_pages = pytest.mark.skipif(
    not _tells_of_huge_pages(), reason="this system has no transparent huge pages, or does not tell who asked for them"
)


def advised(address: int) -> bool:
    """Whether large pages were asked for at that address."""
    inside = False
    with MAPPINGS.open() as file:
        for line in file:
            word = line.split(maxsplit=1)[0]
            if not word.endswith(":"):  # a mapping's bounds; its properties follow
                first, last = (int(bound, 16) for bound in word.split("-"))
                inside = first <= address < last
            elif inside and word == "VmFlags:":
                return "hg" in line.split()
    raise AssertionError("no memory is mapped there, or its flags are not told")
