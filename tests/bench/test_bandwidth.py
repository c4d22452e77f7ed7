"""What is counted as copied is copied, by stores like any other's."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastsepconv.bench import bandwidth, machine


@pytest.mark.parametrize("threads", [1, 2])
def test_every_row_is_copied(threads):
    source = np.arange(threads * 1000, dtype=np.float32).reshape(threads, -1)
    target = np.zeros_like(source)
    bandwidth.copy_all(source, target)
    np.testing.assert_array_equal(target, source)


def test_the_loop_is_no_call_and_has_ordinary_stores():
    """The system's function for it may write past the caches, as kernels do with large results only."""
    rows = np.ones((2, 100), np.float32)
    bandwidth.copy(*rows)
    (assembly,) = bandwidth.copy.inspect_asm().values()
    assert not re.search(r"mem(cpy|move)|\tv?movnt", assembly)


def test_copying_is_told_for_one_thread_and_for_all():
    measured = machine.copying(2)
    assert measured.keys() == {"1", "2"}
    assert min(measured.values()) > 0.5 and max(measured.values()) < 5000, "GB/s, of memory"
