"""How a matrix product is cut: shares of the threads, blocks of rows and parts of the depth, tiles.

All follows from the sizes, so a product is summed in the same order whoever computes it.
"""

from __future__ import annotations

from .amx import SIDE, terms
from .amx_gemm import MOST_DEPTH
from .amx_packing import split_bytes
from .gemm_tile import GEMM_ROWS, gemm_columns
from .jit import kernel
from .memory import ceil_div, share, size_of
from .simd import CACHE_LINE, L1_PERIOD, factors

TILE_ROWS, LEAST_ROWS = GEMM_ROWS[0], GEMM_ROWS[-1]
BLOCK_BYTES = 384 << 10  # a block of a: an L2 of 1 MiB holds it, what the next is made of, and a panel of the kernel
ONLY_BLOCK_BYTES = 720 * 1024  # the same where there is no next one: from L3 it costs less than all panels once more
MOST_BLOCK_BYTES = 1408 * 1024  # of scratch memory, beside panels; one tile at least, however deep
DEPTH_BYTES = 4096  # of a row at once: blocks of deeper rows would have too few of them (see `multiply_block`)
SHARES_A_THREAD = 2  # at most: each begins with rows that nobody has asked for
AMX_BLOCK_BYTES, AMX_BLOCK_ROWS = 1 << 20, 256  # of a in terms of bfloat16: CPUs with AMX have an L2 of 2 MiB
BLOCK_TILES = 168 // TILE_ROWS  # more rows than that would cost more in address translation than they save
THIN_ROWS = 42  # with more, there are tiles enough to copy the next panel meanwhile
WORKER_ROWS = 112  # a worker with fewer would mostly wait for the kernel: filters are split instead


@kernel
def padded_row(dtype, depth):
    """Elements from row to row of a block of a: an odd number of cache lines.

    Rows L1_PERIOD apart share one set of L1, which has fewer ways than the tile has rows.
    """
    line = CACHE_LINE // size_of(dtype)
    return (ceil_div(depth, line) | 1) * line


@kernel
def rows_collide(dtype, depth):
    """Whether rows of `depth` elements, one behind the other, drive each other out of the caches."""
    return depth * size_of(dtype) % (L1_PERIOD // 2) == 0


@kernel
def tile_rows(dtype):
    """Rows of the highest tile."""
    return SIDE if terms(dtype) > 0 else TILE_ROWS


@kernel
def tile_height(rows):
    """The lowest tile that holds `rows` rows."""
    best = TILE_ROWS
    for height in GEMM_ROWS:
        if height >= rows:
            best = height
    return best


@kernel
def row_parts(dtype, rows, filters, workers):
    """Into how many parts the rows are split; `workers` is a multiple of it. Small ones where filters are too few."""
    tile, panels = tile_rows(dtype), ceil_div(filters, gemm_columns(dtype))
    for parts in range(workers, 1, -1):
        enough = ceil_div(rows, tile) >= parts * ceil_div(WORKER_ROWS, tile)
        spare = panels * parts < 2 * workers and rows > parts * THIN_ROWS  # workers, with fewer parts
        if workers % parts == 0 and (enough or spare):
            return parts
    return 1


@kernel
def work(dtype, rows, filters, worker, workers):
    """A worker's share: (first row, past the last, first filter, past the last).

    Rows are shared out in the lowest tiles' heights: in the highest's, of the 20.6 of 288 rows a worker would get 21.
    """
    width, parts = gemm_columns(dtype), row_parts(dtype, rows, filters, workers)
    first, last = share(ceil_div(rows, LEAST_ROWS), worker % parts, parts)
    f_first, f_last = share(ceil_div(filters, width), worker // parts, workers // parts)
    return first * LEAST_ROWS, min(last * LEAST_ROWS, rows), f_first * width, min(f_last * width, filters)


@kernel
def shares(rows, threads, packed):
    """Into how many shares a product is cut for `threads` threads: several each, if the kernel is `packed` beforehand.

    A thread that something else holds up, or that wakes late, then leaves some of its shares to the others: 2 to 3 % of
    a layer in TensorFlow, whose threads take the CPU now and then. Otherwise each share would pack the kernel anew.
    """
    tiles, least = ceil_div(rows, TILE_ROWS) // threads, ceil_div(WORKER_ROWS, TILE_ROWS)
    return threads * min(max(1, tiles // least), SHARES_A_THREAD) if threads > 1 and packed else threads


@kernel
def depth_parts(dtype, depth):
    """Into how many parts the depth is cut, which are summed up in y one after the other. Not where y is less exact
    than its sums, nor for AMX, which has its own (see `amx_gemm`).
    """
    if factors(dtype) > 1 or terms(dtype) > 0:
        return 1
    return max(1, ceil_div(depth * size_of(dtype), DEPTH_BYTES))


@kernel
def _tiles_that_fit(dtype, depth, size):
    """Tiles of a of which a part of the depth fits into `size` bytes, and the whole into a thread's scratch memory,
    with the one that the last block may have besides.
    """
    tile, part = TILE_ROWS * size_of(dtype), ceil_div(depth, depth_parts(dtype, depth))
    most = MOST_BLOCK_BYTES // (tile * padded_row(dtype, depth)) - 1
    return max(1, min(size // (tile * padded_row(dtype, part)), most))


@kernel
def block_count(dtype, depth, rows):
    """Into how many blocks a worker's share of `rows` rows is cut."""
    if terms(dtype) > 0:
        return ceil_div(
            rows, max(SIDE, min(AMX_BLOCK_ROWS, AMX_BLOCK_BYTES // split_bytes(SIDE, min(depth, MOST_DEPTH)) * SIDE))
        )
    tiles = ceil_div(rows, TILE_ROWS)
    if tiles <= _tiles_that_fit(dtype, depth, ONLY_BLOCK_BYTES):
        return 1
    return ceil_div(tiles, min(_tiles_that_fit(dtype, depth, BLOCK_BYTES), BLOCK_TILES))


@kernel
def block_rows(dtype, rows, blocks):
    """The most rows that one of the blocks has, in whole tiles."""
    tile = tile_rows(dtype)
    return min(ceil_div(rows, tile), ceil_div(rows // tile, blocks) + 1) * tile


@kernel
def block_range(dtype, first, last, blocks, number):
    """The rows of one of the blocks of first..last: tiles, about equally many; the last has what is left over as well.

    None, at the end, past the last block.
    """
    if number >= blocks:
        return last, last
    tile = tile_rows(dtype)
    tiles = (last - first) // tile
    begin, end = ceil_div(tiles * number, blocks), ceil_div(tiles * (number + 1), blocks)
    return first + begin * tile, last if number == blocks - 1 else first + end * tile
