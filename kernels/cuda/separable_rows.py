"""Separable convolution in one kernel, for half numbers: depthwise rows stay in shared memory, filters pass by.

    mid[m,c] = sum over r, s of x[n, p*v + r - top, q*v + s - left, c] * dw[r,s,c],  m = (n*P + p)*Q + q
    y[m,f]   = clamp(bias[f] + sum over c of mid[m,c] * w[c,f])

x `[N,H,W,C]`, dw `[R,S,C]`, w `[C,F]`, y `[N,P,Q,F]`. A block computes `tile.rows` pixels of mid once, all channels of
them, rounded to the dtype as if they had gone through memory; then one tile of filters after the other takes its
product with them on tensor cores. Only w is copied in stages, across the borders of tiles, so that the pipeline never
runs dry. Against two kernels this spares mid's way to memory and back; against the usual fusion, which computes mid
inside the loop over the depth, it computes nothing twice.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
from numba import cuda, types

from . import channel_vectors, fragments, gemm_tile, ptx, tiles
from .depthwise_window import tap_loader, window_rounds
from .fragments import inlined, select, spread_bytes
from .gemm_tile import NUMBERS, operand_layout
from .tiles import Launch, SeparableTile, TiledKernel

STAGE_DEPTH = 32  # channels in a stage of w


def shared_bytes(tile: SeparableTile, channels: int) -> int:
    """Dynamic shared memory of a block."""
    stage = operand_layout(NUMBERS["bfloat16"], False, tile.gemm.columns).bytes
    room = 16 * spread_bytes(8 * tile.gemm.column_tiles, 2)
    return tile.gemm.rows * _mid_row_bytes(channels) + tile.gemm.stages * stage + tile.gemm.threads // 32 * room


@lru_cache(tiles.CHOICES_KEPT)
def choose(
    dtype: str,
    taps: tuple[int, int],
    strides: tuple[int, int],
    rows: int,
    channels: int,
    filters: int,
    shared_limit: int,
) -> SeparableTile | None:
    """The tile for dilation 1 and multiplier 1, or None where two kernels have to do.

    `shared_limit` is the shared memory that a block may have: 232448 bytes on compute capability 9.0, 166912 on 8.0.
    The estimate: rounds of blocks that the fullest multiprocessor computes, times the pixels of a block.
    """
    window = tiles.depthwise_forward(dtype, taps, strides, channels)
    if window is None or dtype == "float32" or filters % 8:
        return None
    candidates = [SeparableTile(gemm, window) for gemm in tiles.SEPARABLE_GEMMS]
    fitting = [tile for tile in candidates if shared_bytes(tile, channels) <= shared_limit]

    def cost(tile: SeparableTile) -> int:
        return -(-rows // (tile.gemm.rows * tiles.REFERENCE_MULTIPROCESSORS)) * tile.gemm.rows

    return min(fitting, key=cost, default=None)


@inlined
def _mid_row_bytes(channels):
    """A row of mid: all channels, rounded up to whole stages, an odd number of chunks for the banks' sake."""
    return ((channels + 31) // 32 * 4 | 1) * 16


def _filler(dtype: str, tile: SeparableTile):
    """fill(shared, x, dw, first, rows, ...): the block's rows of mid, from pixel `first` on, into shared memory.

    A thread takes 8 channels of a piece of an image row, and slides along it; pieces that lie outside of the block
    cost their time and do nothing.
    """
    window = tile.window
    taps, stride, vector, threads, block_rows = (
        window.taps,
        window.stride,
        window.width,
        tile.gemm.threads,
        tile.gemm.rows,
    )
    sums_count, taps_count = window.slots * vector, taps * taps * vector
    held = channel_vectors.register_count(dtype, vector)
    pack, load_taps = channel_vectors.packer(dtype, vector), tap_loader(dtype, vector, taps * taps)

    @inlined
    def put(state):
        sums, place, done, (wanted, target, row_bytes, begin, end) = state
        registers = cuda.local.array(held, types.uint32)
        pack(registers, sums, place)
        inside = wanted & (done >= begin) & (done < end)
        ptx.store_shared_128(inside, select(inside, target + done * row_bytes, 0), registers, 0)

    run_round = window_rounds(dtype, window, put)

    @inlined
    def fill(shared, x, dw, first, rows, height, width, channels, out_height, out_width, top, left, groups, segments):
        sums = cuda.local.array(sums_count, types.float32)
        weights = cuda.local.array(taps_count, types.float32)
        row_bytes = np.int32(_mid_row_bytes(channels))
        vectors, share = channels // vector, np.int32((out_width + segments - 1) // segments)
        lines = (first + block_rows - 1) // out_width - first // out_width + 1
        for turn in range((lines * segments * vectors + threads - 1) // threads):
            item = turn * threads + cuda.threadIdx.x
            channel, piece = np.int32(item % vectors * vector), item // vectors
            line, column = np.int32(first // out_width + piece // segments), np.int32(piece % segments * share)
            mine = piece < lines * segments
            load_taps((weights, mine, dw, channel, channels))
            for i in range(sums_count):
                sums[i] = np.float32(0)
            above, before = np.int32(line % out_height * stride - top), np.int32(column * stride - left)
            offset = ((np.int64(line // out_height) * height + above) * width + before) * channels + channel
            start = np.int32(line * out_width + column - first)  # place in the block of the piece's first pixel
            length = select(column + share < out_width, share, out_width - column)
            stop = select(first + block_rows < rows, block_rows, rows - first)
            begin, end = select(start < 0, -start, 0), select(start + length < stop, length, stop - start)
            mine = mine & (begin < end)
            source = (x, offset, mine, above, before, height, width, channels)
            target = (mine, shared + start * row_bytes + 2 * channel, row_bytes, begin, end)
            for group in range(groups):
                run_round((group, (sums, weights), source, target))

    return fill


def _blanker(tile: SeparableTile):
    """blank(shared, first, rows, channels): zeros past the channels and past the last pixel, in whole chunks."""
    threads, block_rows = tile.gemm.threads, tile.gemm.rows

    @inlined
    def blank(shared, first, rows, channels):
        zeros = cuda.local.array(4, types.uint32)
        for i in range(4):
            zeros[i] = np.uint32(0)
        row_bytes = np.int32(_mid_row_bytes(channels))
        chunks = row_bytes // 16
        for turn in range((block_rows * chunks + threads - 1) // threads):
            item = turn * threads + cuda.threadIdx.x
            row, chunk = item // chunks, item % chunks
            wanted = (row < block_rows) & ((8 * chunk >= channels) | (first + row >= rows))
            ptx.store_shared_128(wanted, select(wanted, shared + row * row_bytes + 16 * chunk, 0), zeros, 0)

    return blank


@cache
def forward(dtype: str, tile: SeparableTile) -> TiledKernel:
    """y, of max(x, 0) instead of x if `tile.window.relu`.

    kernel(x, dw, w, bias, y, rows, height, width, channels, filters, out_height, out_width, top, left, groups,
           segments, has_bias, low, high), where rows = N*P*Q; groups and segments are those of `tile.window`.
    Parallel over: tiles of pixels. Assumes: C and F are multiples of 8, dilation 1, and a block's shared memory fits.
    """
    numbers, gemm = NUMBERS[dtype], tile.gemm
    layout = operand_layout(numbers, False, gemm.columns)
    row_tiles, column_tiles, warp_columns, block_rows = gemm.row_tiles, gemm.column_tiles, gemm.warp_columns, gemm.rows
    tile_columns, stages, ahead, in_flight = gemm.columns, gemm.stages, gemm.stages - 1, gemm.stages - 2
    copy_w = gemm_tile.copier(numbers, layout, 16, gemm.threads)
    load_w = gemm_tile.loader_b(numbers, layout, False, column_tiles)
    multiply = gemm_tile.multiplier(numbers, row_tiles, column_tiles)
    finish = gemm_tile.finisher(numbers, row_tiles, column_tiles)
    store = gemm_tile.storer(2, dtype, row_tiles, column_tiles, 16)
    fill, blank = _filler(dtype, tile), _blanker(tile)
    stage_bytes, room = layout.bytes, 16 * spread_bytes(8 * column_tiles, 2)
    count, a_registers, b_registers = gemm.sums, 4 * row_tiles, 2 * column_tiles

    @inlined
    def split_stage(stage, depth_stages):
        return stage % depth_stages * STAGE_DEPTH, stage // depth_stages * tile_columns

    @inlined
    def load_mid(registers, shared, row, row_bytes, step):
        lane = cuda.threadIdx.x & 31
        for i in range(row_tiles):
            r = row + 16 * i + fragments.a_deep_row(lane)
            ptx.load_matrices_4(
                registers, 4 * i, shared + r * row_bytes + 16 * (2 * step + fragments.a_deep_chunk(lane))
            )

    def separable_forward(
        x, dw, w, bias, y, rows, height, width, channels, filters, out_height, out_width, top, left, groups, segments,
        has_bias, low, high,
    ):  # fmt: skip
        sums = cuda.local.array(count, types.float32)
        even_a, odd_a = cuda.local.array(a_registers, types.uint32), cuda.local.array(a_registers, types.uint32)
        even_b, odd_b = cuda.local.array(b_registers, types.uint32), cuda.local.array(b_registers, types.uint32)
        warp = cuda.threadIdx.x >> 5
        warp_row, warp_column = warp // warp_columns * (16 * row_tiles), warp % warp_columns * (8 * column_tiles)
        first, row_bytes = np.int32(cuda.blockIdx.x * block_rows), np.int32(_mid_row_bytes(channels))
        mid = ptx.shared_memory()
        ring = np.uint32(mid + block_rows * row_bytes)
        end = np.uint32(ring + stages * stage_bytes)
        depth_stages = np.int32((channels + STAGE_DEPTH - 1) // STAGE_DEPTH)
        all_stages = np.int32((filters + tile_columns - 1) // tile_columns * depth_stages)
        for stage in range(ahead):
            if stage < all_stages:
                depth, filter_column = split_stage(stage, depth_stages)
                copy_w(ring + stage * stage_bytes, w, depth, channels, filter_column, filters, filters)
            ptx.commit_copies()
        fill(mid, x, dw, first, rows, height, width, channels, out_height, out_width, top, left, groups, segments)
        blank(mid, first, rows, channels)
        ptx.wait_copies(in_flight)
        cuda.syncthreads()
        load_mid(even_a, mid, warp_row, row_bytes, 0)
        load_w(even_b, ring, warp_column, 0)
        reading, writing = ring, np.uint32(ring + ahead * stage_bytes)
        coming = np.int32(ahead)
        for column in range(0, filters, tile_columns):
            for i in range(count):
                sums[i] = np.float32(0)
            for stage in range(depth_stages):
                load_mid(odd_a, mid, warp_row, row_bytes, 2 * stage + 1)
                load_w(odd_b, reading, warp_column, 1)
                if coming < all_stages:
                    depth, filter_column = split_stage(coming, depth_stages)
                    copy_w(writing, w, depth, channels, filter_column, filters, filters)
                ptx.commit_copies()
                coming = np.int32(coming + 1)
                multiply(sums, even_a, even_b)
                reading, writing = np.uint32(reading + stage_bytes), np.uint32(writing + stage_bytes)
                if reading == end:
                    reading = ring
                if writing == end:
                    writing = ring
                ptx.wait_copies(in_flight)
                cuda.syncthreads()
                load_mid(even_a, mid, warp_row, row_bytes, 2 * ((stage + 1) % depth_stages))
                load_w(even_b, reading, warp_column, 0)
                multiply(sums, odd_a, odd_b)
            finish(sums, bias, has_bias, column + warp_column, filters, low, high)
            store(sums, end + warp * room, y, 0, first + warp_row, rows, column + warp_column, filters)
        ptx.wait_copies(0)

    def launch(rows: int, channels: int) -> Launch:
        return Launch((-(-rows // gemm.rows), 1, 1), gemm.threads, shared_bytes(tile, channels))

    signature = types.void(*[numbers.pointer] * 5, *[types.int32] * 12, *[types.float32] * 2)
    return TiledKernel(separable_forward, signature, (gemm.threads, 1), launch)
