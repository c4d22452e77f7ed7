"""The matrix product behind the pointwise step: a block of rows and how it passes the kernel, panel by panel.

    y[m,f] = clamp(start[f] + sum over k of a[m,k] * kernel[k,f] + residual[m,f])

The blocking is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008) with one level
less where the depth is summed in registers as a whole: a block of a stays in L2; panels of the kernel stream past it,
each read by every tile of rows of the block. What is needed next (the next panel, the next block) is asked for while
the registers are busy with the present one. Into how many blocks, and a great depth into how many parts, `blocking`
says. A few rows alone are another matter: see `_multiply_slabs`; and so is what AMX multiplies: see `amx_gemm`.
"""

from __future__ import annotations

from . import amx_gemm
from .amx import MATRICES, MULTIPLIED, terms
from .blocking import THIN_ROWS, TILE_ROWS, block_count, depth_parts, row_parts, rows_collide, tile_height
from .copying_tile import ask_for_rows, copying_tile
from .gemm_tile import ASK_STEP, ASKS_A_STRETCH, EARLY, STRETCH, gemm_columns, gemm_tile
from .jit import kernel
from .memory import ceil_div, share, size_of, view
from .packing import pack, pack_panel, packed_length, panel_length, whole_depth
from .pool import compiled_once
from .simd import CACHE_LINE, factors, infinity

PASSES = 8  # packing a kernel in passing for so many blocks costs no more than packing it once beforehand
STREAMED_BYTES = 24 << 20  # an output larger than that is gone from the caches before anyone reads it
COPYING_ROWS = 70  # of a block, the same where rows of the kernel drive each other out of the caches


@kernel
def workspace_length(dtype, depth, rows):
    """Elements of scratch memory that `multiply_block` wants for blocks of so many rows."""
    if terms(dtype) > 0:
        return amx_gemm.workspace_bytes(dtype, rows, depth) // size_of(dtype)
    part = ceil_div(depth, depth_parts(dtype, depth))
    return max(2 * panel_length(dtype, part), panel_length(dtype, min(depth, EARLY)))  # panels, or a slab of a kernel


@kernel
def _shares_panels(dtype, rows, depth, filters, row_stride, column_stride, workers):
    """Whether the kernel is packed beforehand, for all: if packing in passing, or slowly, for each block costs more, or
    cannot be: so with pairs of bfloat16."""
    part = ceil_div(rows, row_parts(dtype, rows, filters, workers))
    blocks = block_count(dtype, depth, part)
    if terms(dtype) > 0:
        return blocks > 1 or column_stride != 1
    enough = part // max(1, blocks) >= COPYING_ROWS or not rows_collide(dtype, row_stride)
    return factors(dtype) > 1 or blocks > (PASSES if enough and column_stride == 1 else 1)


@kernel
def shared_length(dtype, rows, depth, filters, row_stride, column_stride, kept, workers):
    """Elements of scratch memory that `shared_panels` wants."""
    shared = kept == 0 and _shares_panels(dtype, rows, depth, filters, row_stride, column_stride, workers)
    return packed_length(dtype, depth, filters) if shared else 0


@kernel
def shared_panels(dtype, rows, depth, filters, kernel, row_stride, column_stride, kept, packed, workers):
    """The kernel in panels: those `kept`, or packed now at `packed`; 0 where each worker packs its own."""
    if kept != 0:
        return kept
    if not _shares_panels(dtype, rows, depth, filters, row_stride, column_stride, workers):
        return 0
    pack(dtype, workers, depth, filters, kernel, row_stride, column_stride, packed)
    return packed


@kernel
def past_caches(dtype, rows, filters, y):
    """Whether y is better written past the caches: 1 where it would not stay in them, and vectors can be aligned.

    Not what the dot products of bfloat16 give: they took 7 to 15 % longer so (Zen 4).
    """
    row_bytes = filters * size_of(dtype)
    aligned_rows = y % CACHE_LINE == 0 and row_bytes % CACHE_LINE == 0
    pays = factors(dtype) == 1 or terms(dtype) > 0
    return 1 if pays and aligned_rows and rows * row_bytes > STREAMED_BYTES else 0


@kernel
def lines_of_row(dtype, first, row_stride, columns):
    """Cache lines that so many elements of a row touch at most; of others of the matrix, they are as many further on.

    `first` is the address of the matrix's first element.
    """
    itemsize = size_of(dtype)
    aligned = (first | row_stride * itemsize | columns * itemsize) % CACHE_LINE == 0
    return ceil_div(columns * itemsize, CACHE_LINE) + (0 if aligned else 1)


@kernel
def column_of_lines(dtype, first, row_stride, number):
    """What a tile asks for of rows whose first one begins at `first`: (address, elements to the next).

    A column of lines, one of each row, takes ASK_STEP tiles: each asks for every ASK_STEPth row.
    """
    row, column = number % ASK_STEP, number // ASK_STEP
    return first + row * row_stride * size_of(dtype) + column * CACHE_LINE, ASK_STEP * row_stride


@kernel
def products(dtype, depth):
    """How many products sum up so many factors."""
    return ceil_div(depth, factors(dtype))


@kernel
def clear_behind(dtype, rows, depth, a, a_row):
    """Zeros behind each row of a block of a, up to whole products: of what lies there a NaN would not be lost."""
    if terms(dtype) > 1:  # the block is split, up to what is there
        return
    for k in range(depth, whole_depth(dtype, depth)):
        for m in range(rows):
            view(dtype, a + (m * a_row + k) * size_of(dtype), 1)[0] = 0


@kernel
def _asks(products):
    """Lines that a tile asks for: none in the stretch that is not whole."""
    return products // STRETCH * ASKS_A_STRETCH


@kernel
def _copied_ahead(dtype, rows, depth):
    """How the next panel is copied by whole tiles of so many rows, but for the first, which may pack: (tiles that copy,
    rows of it with each stretch). No tiles where that is not worth while, or cannot be.
    """
    tiles = min(STRETCH, rows // TILE_ROWS - 1)
    if tiles < 2 or depth < STRETCH or factors(dtype) > 1:
        return 0, 0
    copies = ceil_div(depth, tiles * (depth // STRETCH))
    return ceil_div(depth, copies * (depth // STRETCH)), copies


@compiled_once(but_for=MULTIPLIED)
def _multiply_panel(
    dtype, rows, depth, filters, columns, a, a_row, tail, b, b_step, panel, next_b, next_step, next_panel,
    ahead, ahead_step, start, start_row, residual_offset, y, past_caches, low, high,
):  # fmt: skip
    """One panel of filters: tiles of rows pass it, each in L1 for its depth. The first packs b into `panel`, if not 0,
    and asks for its rows early.

    Of what comes next the first tiles ask for the next panel, a column of lines each, or copy it to `next_panel`, if
    that is not 0; the others ask for `ahead`.
    """
    itemsize = size_of(dtype)
    count, packed = products(dtype, depth), panel
    asks, row = _asks(count), gemm_columns(dtype) * factors(dtype)
    tiles_asking = lines_of_row(dtype, next_b, next_step, row) * ASK_STEP
    silent, copying, copies = 1 if panel != 0 else 0, 0, 0
    if next_panel != 0:
        copying, copies = _copied_ahead(dtype, rows, depth)
        tiles_asking = copying
        if silent != 0:
            ask_for_rows(dtype, next_b, next_step)
    copied = copies * (depth // STRETCH)  # by each tile
    for m in range(0, rows, TILE_ROWS):
        height, turn = min(TILE_ROWS, rows - m), m // TILE_ROWS - silent
        if packed != 0:
            wanted, step = b + min(EARLY, depth) * b_step * itemsize, b_step
        elif turn < tiles_asking:
            wanted, step = column_of_lines(dtype, next_b, next_step, turn)
        else:
            wanted, step = ahead + (turn - tiles_asking) * asks * ahead_step * itemsize, ahead_step
        block = a + m * a_row * itemsize if height == TILE_ROWS or tail == 0 else tail
        if 0 <= turn < copying:
            k = min(turn * copied, depth - copied)  # the last one copies some rows once more
            copying_tile(
                dtype, count, block, a_row, b, start + m * start_row * itemsize, start_row, residual_offset,
                y + m * filters * itemsize, filters, past_caches, low, high,
                next_b + k * next_step * itemsize, next_step, next_panel + k * row * itemsize, copies,
            )  # fmt: skip
            if turn == copying - 1:  # they come while the tiles that are left are computed
                ask_for_rows(dtype, next_b + row * itemsize, next_step)
            continue
        gemm_tile(
            dtype, tile_height(height), height, columns, count, block, a_row, factors(dtype), b, b_step, packed,
            wanted, step, start + m * start_row * itemsize, start_row,
            residual_offset, y + m * filters * itemsize, filters, past_caches, low, high,
        )  # fmt: skip
        if packed != 0:
            b, b_step, packed = panel, row, 0


@kernel
def is_thin(dtype, rows, column_stride):
    """Whether a kernel that is not packed is better read in slabs: for so few rows it takes longer to come than to use.

    Asked for all rows of a product, since that decides on the order in which it is summed, which threads must not.
    """
    return rows <= THIN_ROWS and column_stride == 1 and factors(dtype) == 1 and terms(dtype) == 0


@kernel
def _multiply_slabs(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, own, start, residual_offset, y,
    low, high,
):  # fmt: skip
    """Filters f_first..f_last of y for few rows: the kernel is read a slab of its rows at a time, all panels of each.

    Every panel's tile goes on summing in y and asks for its part of the next slab. A panel at a time would skip through
    the whole kernel for two cache lines of each row, which memory answers half as fast.
    """
    itemsize, width = size_of(dtype), gemm_columns(dtype)
    slabs = max(1, ceil_div(depth, EARLY))
    begin, begin_row, offset, least, most = start, 0, 0, -infinity(dtype), infinity(dtype)
    for slab in range(slabs):
        k, k_end = share(depth, slab, slabs)
        if slab == slabs - 1:
            offset, least, most = residual_offset, low, high
        a_slab, tail_slab = a + k * itemsize, tail + k * itemsize if tail != 0 else 0
        for f in range(f_first, f_last, width):
            columns, at = min(width, filters - f), f * itemsize
            b, b_step, panel = kernel + k * row_stride * itemsize + at, row_stride, own
            if columns < width:
                pack_panel(dtype, k_end - k, columns, b, row_stride, 1, own)
                b, b_step, panel = own, width, 0
            _multiply_panel(
                dtype, rows, k_end - k, filters, columns, a_slab, a_row, tail_slab, b, b_step, panel, a, 0, 0, a, 0,
                begin + at, begin_row, offset, y + at, 0, least, most,
            )  # fmt: skip
        begin, begin_row = y, filters


@kernel
def _multiply_part(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, column_stride,
    panels, length, own, start, start_row, residual_offset, y, past_caches, ahead, ahead_length, low, high,
):  # fmt: skip
    """`multiply_block` for a part of the depth, whose panels are `length` elements apart."""
    itemsize = size_of(dtype)
    width, line = gemm_columns(dtype), CACHE_LINE // itemsize
    row = width * factors(dtype)
    silent = 1 if panels == 0 and column_stride == 1 else 0  # the tile that packs in passing
    lines = lines_of_row(dtype, panels, row, row) if panels != 0 else lines_of_row(dtype, kernel, row_stride, width)
    copying, _ = _copied_ahead(dtype, rows, depth) if silent != 0 else (0, 0)
    asking = silent + (copying if copying > 0 else lines * ASK_STEP)
    asks_ahead = max(0, ceil_div(rows, TILE_ROWS) - asking) * _asks(products(dtype, depth))
    step_ahead = min(line, ceil_div(ahead_length, max(1, ceil_div(f_last - f_first, width) * asks_ahead)))
    other, is_packed = own + panel_length(dtype, depth) * itemsize, False
    for f in range(f_first, f_last, width):
        columns = min(width, filters - f)
        source, past = kernel + f * column_stride * itemsize, ahead + ahead_length * itemsize
        b, b_step, panel, next_panel = panels + f // width * length * itemsize, row, 0, 0
        next_b, next_step = b + length * itemsize, row
        if panels == 0:
            b, b_step, panel = source, row_stride, own
            next_b, next_step = source + width * column_stride * itemsize, row_stride
            if is_packed:
                b, b_step, panel = own, row, 0
            elif columns < width or column_stride != 1:
                pack_panel(dtype, depth, columns, source, row_stride, column_stride, own)
                b, b_step, panel = own, row, 0
            is_packed = copying > 0 and f + 2 * width <= min(filters, f_last)
            next_panel = other if is_packed else 0
            own, other = other, own
        # Not where one tile of rows goes through panels as fast as memory gives them: there the hardware's own reading
        # ahead is 1.2 to 1.8 times as fast (Zen 4). But where a panel's rows collide, and drive each other on from L2
        # to L3: not to wait for memory makes 10x10x1024-1536 1.3 times as fast (Zen 3).
        if rows <= TILE_ROWS:
            next_step = 0
        _multiply_panel(
            dtype, rows, depth, filters, columns, a, a_row, tail, b, b_step, panel, next_b, next_step, next_panel,
            ahead, step_ahead if ahead < past else 0, start + f * itemsize, start_row, residual_offset,
            y + f * itemsize, past_caches, low, high,
        )  # fmt: skip
        ahead += asks_ahead * step_ahead * itemsize


@kernel
def multiply_block(
    dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, column_stride,
    thin, panels, own, start, residual_offset, y, past_caches, ahead, ahead_length, low, high,
):  # fmt: skip
    """Filters f_first..f_last of y for a block of rows; y is the address of its first row.

    The residual is at y + residual_offset, in bytes; there is none where that is 0.

    The kernel lies in packed `panels`, or is packed into `own`, which has room for two: the first panel as it is used,
    the others while that before them is. Meanwhile the `ahead_length` elements at `ahead` are brought into L2.

    Assumes: a is readable up to a whole tile past its last row, or its last, smaller tile is at `tail` as well;
    `thin` is what `is_thin` says of the whole product, of which the rows may be a part.
    """
    if MATRICES and terms(dtype) > 0:
        amx_gemm.multiply_in_tiles(
            dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, panels, start,
            residual_offset, y, past_caches, own, low, high,
        )  # fmt: skip
        return
    if thin and panels == 0:
        _multiply_slabs(
            dtype, rows, depth, filters, f_first, f_last, a, a_row, tail, kernel, row_stride, own, start,
            residual_offset, y, low, high,
        )  # fmt: skip
        return
    itemsize, parts, length = size_of(dtype), depth_parts(dtype, depth), panel_length(dtype, depth)
    begin, begin_row, offset, streamed, asked, least, most = start, 0, 0, 0, 0, -infinity(dtype), infinity(dtype)
    for part in range(parts):
        k, k_end = share(depth, part, parts)
        if part == parts - 1:
            offset, streamed, asked, least, most = residual_offset, past_caches, ahead_length, low, high
        _multiply_part(
            dtype, rows, k_end - k, filters, f_first, f_last, a + k * itemsize, a_row,
            tail + k * itemsize if tail != 0 else 0, kernel + k * row_stride * itemsize, row_stride, column_stride,
            panels + k * gemm_columns(dtype) * itemsize if panels != 0 else 0, length, own, begin, begin_row, offset, y,
            streamed, ahead, asked, least, most,
        )  # fmt: skip
        begin, begin_row = y, filters
