"""Adds partial sums in a fixed order: the second stage of every gradient that sums over pixels."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, types

from . import ptx
from .tiles import Launch, TiledKernel

THREADS = 256


@cache
def add_partials(dtype: str) -> TiledKernel:
    """out[i] = sum over s of partials[s,i]: kernel(partials, out, count, splits), the splits in ascending order.

    partials `[splits,count]` float32, out `[count]`. Parallel over: out. Assumes: of half numbers, an even count.
    """
    halves = dtype in ("bfloat16", "float16")
    pack = ptx.pack_bf16 if dtype == "bfloat16" else ptx.pack_f16
    per_thread = 2 if halves else 1

    def add_partials(partials, out, count, splits):
        at = (np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * per_thread
        first, second = np.float32(0), np.float32(0)
        for split in range(splits):
            first += ptx.float_of(ptx.load_global_32(at < count, partials, np.int64(split) * count + at))
            if halves:
                second += ptx.float_of(ptx.load_global_32(at < count, partials, np.int64(split) * count + at + 1))
        if halves:
            ptx.store_global_32(at < count, out, at, pack(first, second))
        else:
            ptx.store_global_32(at < count, out, at, ptx.bits_of(first))

    def launch(count: int) -> Launch:
        return Launch((-(-count // (THREADS * per_thread)), 1, 1), THREADS, 0)

    out = types.CPointer(types.uint16 if halves else types.float32)
    signature = types.void(types.CPointer(types.float32), out, types.int32, types.int32)
    return TiledKernel(add_partials, signature, (THREADS, 4), launch)
