"""Pointwise convolution on tensor cores: the product of matrices in its three orientations, each a kernel.

    forward   y[m,f]    = clamp(bias[f] + sum over c of x[m,c] * w[c,f])     x `[rows,C]`, w `[C,F]`, y `[rows,F]`
    d_x       d_x[m,c]  = sum over f of dy[m,f] * w[c,f]                     dy `[rows,F]`
    d_kernel  d_w[c,f]  = sum over m of x[m,c] * dy[m,f]                     in two stages, see `kernel_gradient`

A block computes one tile of the result: for each stage of the depth a piece of A and one of B are copied to shared
memory by cp.async, several stages ahead; warps take their fragments from there, those of the next step while the
present one multiplies. Sums are float32. Loops, from the outside in: stages, steps, row fragments, column fragments.
The tiles of Hopper's warpgroups have another accumulation, `warpgroup_tile`, and the same ends. As TF32 they take no
operand whose depth runs across its rows: forward is given w transposed, and d_w is not theirs.

Source: the multistage pipeline of CUTLASS 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda, types

from . import gemm_tile, ptx, warpgroup_tile
from .fragments import inlined, select, spread_bytes
from .gemm_tile import NUMBERS, operand_layout
from .tiles import HOPPER, GemmTile, Launch, TiledKernel, takes_only_deep


def shared_bytes(dtype: str, tile: GemmTile, a_deep: bool, b_deep: bool, out_itemsize: int) -> int:
    """Dynamic shared memory of a block: the stages, or the warps' rooms for results, whichever is larger."""
    rooms = tile.threads // 32 * 16 * spread_bytes(tile.columns // tile.warp_columns, out_itemsize)
    if tile.architecture == HOPPER:
        return max(warpgroup_tile.shared_bytes(tile, a_deep, b_deep), rooms)
    numbers = NUMBERS[dtype]
    stage = operand_layout(numbers, a_deep, tile.rows).bytes + operand_layout(numbers, b_deep, tile.columns).bytes
    return max(tile.stages * stage, rooms)


def _accumulator(dtype: str, tile: GemmTile, a_deep: bool, b_deep: bool):
    """accumulate(sums, a, b, row, rows, column, columns, depth, last, a_stride, b_stride)

    sums += A[row:, depth:last] . B[depth:last, column:] for this warp's part of the block's tile.
    """
    numbers = NUMBERS[dtype]
    if tile.architecture == HOPPER:
        return warpgroup_tile.accumulator(numbers, tile, a_deep, b_deep)
    a_layout = operand_layout(numbers, a_deep, tile.rows)
    b_layout = operand_layout(numbers, b_deep, tile.columns)
    row_tiles, column_tiles, warp_columns = tile.row_tiles, tile.column_tiles, tile.warp_columns
    copy_a = gemm_tile.copier(numbers, a_layout, tile.copy_bytes, tile.threads)
    copy_b = gemm_tile.copier(numbers, b_layout, tile.copy_bytes, tile.threads)
    load_a = gemm_tile.loader_a(numbers, a_layout, a_deep, row_tiles)
    load_b = gemm_tile.loader_b(numbers, b_layout, b_deep, column_tiles)
    multiply = gemm_tile.multiplier(numbers, row_tiles, column_tiles)
    stages, ahead, in_flight, stage_depth = tile.stages, tile.stages - 1, tile.stages - 2, 2 * numbers.step
    a_bytes, stage_bytes = a_layout.bytes, a_layout.bytes + b_layout.bytes
    a_registers, b_registers = 4 * row_tiles, 2 * column_tiles

    @inlined
    def copy_stage(shared, a, b, row, rows, column, columns, depth, last, a_stride, b_stride):
        if a_deep:
            copy_a(shared, a, row, rows, depth, last, a_stride)
        else:
            copy_a(shared, a, depth, last, row, rows, a_stride)
        if b_deep:
            copy_b(shared + a_bytes, b, column, columns, depth, last, b_stride)
        else:
            copy_b(shared + a_bytes, b, depth, last, column, columns, b_stride)

    @inlined
    def accumulate(sums, a, b, row, rows, column, columns, depth, last, a_stride, b_stride):
        even_a, odd_a = cuda.local.array(a_registers, types.uint32), cuda.local.array(a_registers, types.uint32)
        even_b, odd_b = cuda.local.array(b_registers, types.uint32), cuda.local.array(b_registers, types.uint32)
        warp = cuda.threadIdx.x >> 5
        warp_row, warp_column = warp // warp_columns * (16 * row_tiles), warp % warp_columns * (8 * column_tiles)
        shared = ptx.shared_memory()
        for stage in range(ahead):
            copy_stage(
                shared + stage * stage_bytes,
                a, b, row, rows, column, columns, depth + stage * stage_depth, last, a_stride, b_stride,
            )  # fmt: skip
            ptx.commit_copies()
        ptx.wait_copies(in_flight)
        cuda.syncthreads()
        load_a(even_a, shared, warp_row, 0)
        load_b(even_b, shared + a_bytes, warp_column, 0)
        reading, writing = shared, np.uint32(shared + ahead * stage_bytes)
        end = np.uint32(shared + stages * stage_bytes)
        for at in range(depth, last, stage_depth):
            load_a(odd_a, reading, warp_row, 1)
            load_b(odd_b, reading + a_bytes, warp_column, 1)
            later = np.int32(at + ahead * stage_depth)
            if later < last:
                copy_stage(writing, a, b, row, rows, column, columns, later, last, a_stride, b_stride)
            ptx.commit_copies()
            multiply(sums, even_a, even_b)
            reading = np.uint32(reading + stage_bytes)
            writing = np.uint32(writing + stage_bytes)
            if reading == end:
                reading = shared
            if writing == end:
                writing = shared
            ptx.wait_copies(in_flight)
            cuda.syncthreads()
            load_a(even_a, reading, warp_row, 0)
            load_b(even_b, reading + a_bytes, warp_column, 0)
            multiply(sums, odd_a, odd_b)
        ptx.wait_copies(0)
        cuda.syncthreads()

    return accumulate


def _placing(tile: GemmTile):
    """place(columns) -> (row, column) of the block's tile; warp_place() -> those of the warp's part in it.

    Tiles of one row of the result follow each other, so that the blocks that run at once share rows of A.
    """
    tile_rows, tile_columns, warp_columns = tile.rows, tile.columns, tile.warp_columns
    row_step, column_step = 16 * tile.row_tiles, 8 * tile.column_tiles

    @inlined
    def place(columns):
        across = (columns + tile_columns - 1) // tile_columns
        return np.int32(cuda.blockIdx.x // across * tile_rows), np.int32(cuda.blockIdx.x % across * tile_columns)

    @inlined
    def warp_place():
        warp = cuda.threadIdx.x >> 5
        return warp // warp_columns * row_step, warp % warp_columns * column_step

    return place, warp_place


def _zeros(count: int):
    @inlined
    def clear(sums):
        for i in range(count):
            sums[i] = np.float32(0)

    return clear


@cache
def forward(dtype: str, tile: GemmTile) -> TiledKernel:
    """y = clamp(x . w + bias): kernel(x, w, bias, y, rows, columns, depth, has_bias, low, high).

    w `[depth,columns]`, or `[columns,depth]` and rounded to TF32 where the tile `takes_only_deep`.
    Parallel over: tiles of y. Assumes: rows of x, w and y are multiples of `tile.copy_bytes` long and begin on them.
    """
    numbers, w_deep = NUMBERS[dtype], takes_only_deep(dtype, tile)
    accumulate, clear = _accumulator(dtype, tile, True, w_deep), _zeros(tile.sums)
    place, warp_place = _placing(tile)
    finish = gemm_tile.finisher(numbers, tile.row_tiles, tile.column_tiles)
    store = gemm_tile.storer(numbers.itemsize, dtype, tile.row_tiles, tile.column_tiles, tile.store_bytes)
    count, room = tile.sums, 16 * spread_bytes(8 * tile.column_tiles, numbers.itemsize)

    def pointwise_forward(x, w, bias, y, rows, columns, depth, has_bias, low, high):
        sums = cuda.local.array(count, types.float32)
        clear(sums)
        row, column = place(columns)
        accumulate(sums, x, w, row, rows, column, columns, 0, depth, depth, select(w_deep, depth, columns))
        warp_row, warp_column = warp_place()
        finish(sums, bias, has_bias, column + warp_column, columns, low, high)
        shared = ptx.shared_memory() + (cuda.threadIdx.x >> 5) * room
        store(sums, shared, y, 0, row + warp_row, rows, column + warp_column, columns)

    size = shared_bytes(dtype, tile, True, w_deep, numbers.itemsize)

    def launch(rows: int, columns: int) -> Launch:
        return Launch((tile.blocks_of(rows, columns), 1, 1), tile.threads, size)

    pointer = numbers.pointer
    signature = types.void(*[pointer] * 4, *[types.int32] * 4, *[types.float32] * 2)
    return TiledKernel(pointwise_forward, signature, (tile.threads, tile.blocks), launch, tile.architecture)


@cache
def input_gradient(dtype: str, tile: GemmTile) -> TiledKernel:
    """d_x = dy . w^T: kernel(dy, w, d_x, rows, columns, depth), columns being those of d_x, depth those of dy.

    Parallel over: tiles of d_x. Assumes: as `forward`.
    """
    numbers = NUMBERS[dtype]
    accumulate, clear = _accumulator(dtype, tile, True, True), _zeros(tile.sums)
    place, warp_place = _placing(tile)
    store = gemm_tile.storer(numbers.itemsize, dtype, tile.row_tiles, tile.column_tiles, tile.store_bytes)
    count, room = tile.sums, 16 * spread_bytes(8 * tile.column_tiles, numbers.itemsize)

    def pointwise_input_gradient(dy, w, d_x, rows, columns, depth):
        sums = cuda.local.array(count, types.float32)
        clear(sums)
        row, column = place(columns)
        accumulate(sums, dy, w, row, rows, column, columns, 0, depth, depth, depth)
        warp_row, warp_column = warp_place()
        shared = ptx.shared_memory() + (cuda.threadIdx.x >> 5) * room
        store(sums, shared, d_x, 0, row + warp_row, rows, column + warp_column, columns)

    size = shared_bytes(dtype, tile, True, True, numbers.itemsize)

    def launch(rows: int, columns: int) -> Launch:
        return Launch((tile.blocks_of(rows, columns), 1, 1), tile.threads, size)

    signature = types.void(*[numbers.pointer] * 3, *[types.int32] * 3)
    return TiledKernel(pointwise_input_gradient, signature, (tile.threads, tile.blocks), launch, tile.architecture)


@cache
def kernel_gradient(dtype: str, tile: GemmTile) -> TiledKernel:
    """partials[s] = x[rows of s]^T . dy[rows of s]: kernel(x, dy, partials, rows, columns, depth, share).

    x `[depth,rows]`, dy `[depth,columns]`, partials `[splits,rows,columns]` float32; split s sums over the places
    s*share up to (s+1)*share of the depth; `partial_sums.add_partials` adds them, in an order that the shape gives.
    Parallel over: tiles of the result, and splits. Assumes: as `forward`; share is a multiple of two steps.
    """
    numbers = NUMBERS[dtype]
    accumulate, clear = _accumulator(dtype, tile, False, False), _zeros(tile.sums)
    place, warp_place = _placing(tile)
    store = gemm_tile.storer(4, "float32", tile.row_tiles, tile.column_tiles, tile.store_bytes)
    count, room = tile.sums, 16 * spread_bytes(8 * tile.column_tiles, 4)

    def pointwise_kernel_gradient(x, dy, partials, rows, columns, depth, share):
        sums = cuda.local.array(count, types.float32)
        clear(sums)
        row, column = place(columns)
        first = cuda.blockIdx.y * share
        accumulate(sums, x, dy, row, rows, column, columns, first, min(first + share, depth), rows, columns)
        warp_row, warp_column = warp_place()
        shared = ptx.shared_memory() + (cuda.threadIdx.x >> 5) * room
        start = cuda.blockIdx.y * rows * columns
        store(sums, shared, partials, start, row + warp_row, rows, column + warp_column, columns)

    size = shared_bytes(dtype, tile, False, False, 4)

    def launch(rows: int, columns: int, depth: int, share: int) -> Launch:
        return Launch((tile.blocks_of(rows, columns), -(-depth // share), 1), tile.threads, size)

    signature = types.void(*[numbers.pointer] * 2, types.CPointer(types.float32), *[types.int32] * 4)
    return TiledKernel(pointwise_kernel_gradient, signature, (tile.threads, tile.blocks), launch, tile.architecture)


def factories(dtype: str, tile: GemmTile) -> tuple[Callable[[str, GemmTile], TiledKernel], ...]:
    """What makes the kernels that there are of a tile."""
    return (forward, input_gradient) if takes_only_deep(dtype, tile) else (forward, input_gradient, kernel_gradient)
