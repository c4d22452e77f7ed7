"""A transpose of a kernel, for products that take it only with the depth along its rows."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, types

from . import ptx
from .gemm_tile import NUMBERS
from .tiles import Launch, TiledKernel

SIDE = 32  # of the square that a block moves: as many numbers as a warp has lanes
WARPS = 8
PITCH = 4 * (SIDE + 1)  # bytes from row to row in shared memory: a column then falls on 32 banks, as a row does


@cache
def transpose(dtype: str) -> TiledKernel:
    """out[j,i] = w[i,j], rounded to nearest: kernel(w, out, rows, columns); there is one for tf32.

    w `[rows,columns]` and out `[columns,rows]`. A warp reads 32 numbers that lie side by side in w, and writes 32 that
    lie below each other there; they change hands in shared memory.
    Parallel over: squares of w.
    """
    rounded = {"tf32": ptx.round_tf32}[dtype]

    def transpose(w, out, rows, columns):
        across = (columns + SIDE - 1) // SIDE
        row, column = np.int64(cuda.blockIdx.x // across) * SIDE, np.int64(cuda.blockIdx.x % across) * SIDE
        warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
        shared = ptx.shared_memory()
        for turn in range(SIDE // WARPS):
            i = turn * WARPS + warp
            wanted = (row + i < rows) & (column + lane < columns)
            number = ptx.float_of(ptx.load_global_32(wanted, w, (row + i) * columns + column + lane))
            ptx.store_shared_32(shared + i * PITCH + 4 * lane, rounded(number))
        cuda.syncthreads()
        for turn in range(SIDE // WARPS):
            j = turn * WARPS + warp
            wanted = (column + j < columns) & (row + lane < rows)
            bits = ptx.load_shared_32(shared + lane * PITCH + 4 * j)
            ptx.store_global_32(wanted, out, (column + j) * rows + row + lane, bits)

    def launch(rows: int, columns: int) -> Launch:
        return Launch((-(-rows // SIDE) * -(-columns // SIDE), 1, 1), 32 * WARPS, SIDE * PITCH)

    signature = types.void(*[NUMBERS[dtype].pointer] * 2, types.int32, types.int32)
    return TiledKernel(transpose, signature, (32 * WARPS, 8), launch)
