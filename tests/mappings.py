"""What Linux tells of this process's memory."""

from __future__ import annotations

import os

import pytest

wants_huge_pages = pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="this system has no transparent huge pages"
)


def advised(address: int) -> bool:
    """Whether large pages were asked for at that address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            word = line.split(maxsplit=1)[0]
            if not word.endswith(":"):  # a mapping's bounds; its properties follow
                first, last = (int(bound, 16) for bound in word.split("-"))
                inside = first <= address < last
            elif inside and word == "VmFlags:":
                return "hg" in line.split()
    raise AssertionError("no memory is mapped there, or its flags are not told")
