"""How fast the machine copies what no cache holds: the rate that binds a depthwise convolution of a large image.

Bytes that are read and bytes that are written count, as in STREAM's copy; that an ordinary store reads its line first
does not. Run as a program, in a process of its own: `python bandwidth.py THREADS` prints one JSON object,
{"gbytes": {"1": ..., "THREADS": ...}}.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import numba
import numpy as np

ARRAY_BYTES = 512 << 20  # of either array: the two are twice as large as the largest caches


@numba.njit
def copy(source, target):
    """target[i] = source[i], by ordinary stores, which is how kernels leave all results but large ones."""
    for index in range(source.size):
        target[index] = source[index]


@numba.njit(parallel=True)
def copy_all(source, target):
    """A row each thread."""
    for thread in numba.prange(source.shape[0]):
        copy(source[thread], target[thread])


@numba.njit(parallel=True)
def touch_all(array):
    """Write ones, a row each thread: memory that was never written is no memory yet."""
    for thread in numba.prange(array.shape[0]):
        array[thread, :] = 1


def measure(threads: int, array_bytes: int = ARRAY_BYTES, series: int = 5, repeats: int = 7) -> float:
    """GB/s of `threads` threads: the highest of some medians, lest a busy moment count."""
    numba.set_num_threads(threads)
    source, target = (np.empty((threads, array_bytes // 4 // threads), np.float32) for _ in range(2))
    touch_all(source)
    copy_all(source, target)

    def timed() -> float:
        start = time.perf_counter()
        copy_all(source, target)
        return time.perf_counter() - start

    seconds = min(median(timed() for _ in range(repeats)) for _ in range(series))
    return (source.nbytes + target.nbytes) / seconds / 1e9


if __name__ == "__main__":
    counts = sorted({1, int(sys.argv[1])})
    print(json.dumps({"gbytes": {str(count): measure(count) for count in counts}}))
