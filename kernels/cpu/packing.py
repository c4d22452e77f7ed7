"""A pointwise kernel, or a block of dy, copied into the panels that `gemm_tile` reads, or `amx_tile`.

    panel[k*width + j] = source[k*row_stride + j*column_stride]      for j < columns, 0 for the others up to `width`

One of the strides is 1: rows are copied as they lie, columns are transposed in registers a square at a time. Of
bfloat16 a panel holds two rows in one, a column's elements k and k + 1 side by side; 0 stands for those past the last.
Panels of what AMX multiplies as float32 are those of `amx_packing`.
"""

from __future__ import annotations

from numba.core import cgutils, types
from numba.extending import intrinsic

from .amx import MATRICES, STEP, terms
from .amx_packing import split_bytes, split_panel, split_transposed_panel
from .gemm_tile import EARLY, GEMM_ROWS, gemm_columns
from .jit import kernel
from .memory import ceil_div, share, size_of
from .pool import parallel_kernel
from .simd import Vectors, factors, index, transposed, vectors_of
from .tiles import CHOSEN

PANELS_AT_ONCE = 4  # a line of each is written in turn: a few sets of L1 hold them, even where they collide
BYTES_AHEAD = 256  # of a column, from being asked for to being transposed: no core reads ahead in so many columns


@intrinsic
def _copy_rows(typing_context, dtype, depth, columns, source, row_stride, panel):
    """The panel of a source whose columns lie side by side."""

    def codegen(context, builder, signature, arguments):
        _emit_copy(vectors_of(builder, signature), CHOSEN.vectors, EARLY, *arguments[1:])
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 5), codegen


@intrinsic
def _copy_panels(typing_context, dtype, depth, panels, source, row_stride, target):
    """`panels` whole panels of such a source at once, row by row: each row is read as far as it goes."""

    def codegen(context, builder, signature, arguments):
        _, depth, panels, source, row_stride, target = arguments
        emit = vectors_of(builder, signature)
        whole, width = [emit.mask(index(CHOSEN.vectors * emit.lanes))] * CHOSEN.vectors, CHOSEN.vectors * emit.lanes
        rows = _products(emit, depth)
        length = builder.mul(rows, index(width * emit.factors))
        with cgutils.for_range(builder, rows) as row, cgutils.for_range(builder, panels) as panel:
            k = builder.mul(row.index, index(emit.factors))
            line = emit.at(emit.pointer(source), builder.mul(k, row_stride))
            line = emit.at(line, builder.mul(panel.index, index(width)))
            copy = emit.at(emit.pointer(target), builder.mul(k, index(width)))
            copy = emit.at(copy, builder.mul(panel.index, length))
            emit.copy_factors(line, row_stride, builder.sub(depth, k), whole, copy)
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 5), codegen


@intrinsic
def pack_strip(typing_context, dtype, rows, columns, source, row_stride, strip):
    """Columns of a matrix for `gemm_tile` to multiply by: `strip[m*strip_width + i] = source[m*row_stride + i]`

    for i < columns, 0 for the others up to `strip_width`. `columns` is at most GEMM_ROWS[0].
    """

    def codegen(context, builder, signature, arguments):
        emit = vectors_of(builder, signature)
        _emit_copy(emit, _strip_vectors(emit), 0, *arguments[1:])
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 5), codegen


@intrinsic
def strip_width(typing_context, dtype):
    """Elements from row to row of a strip."""

    def codegen(context, builder, signature, arguments):
        emit = vectors_of(builder, signature)
        return index(_strip_vectors(emit) * emit.lanes)

    return types.intp(dtype), codegen


def _strip_vectors(emit: Vectors) -> int:
    return -(-GEMM_ROWS[0] // emit.lanes)


def _emit_copy(emit: Vectors, vectors: int, early: int, rows, columns, source, row_stride, target) -> None:
    """The first `columns` columns of a matrix, and zeros up to so many vectors, row behind row.

    Each row asks for that which is `early` rows on, if that is not 0.
    """
    builder, width = emit.builder, index(vectors * emit.lanes)
    masks = [emit.mask(columns, j * emit.lanes) for j in range(vectors)]
    with cgutils.for_range(builder, _products(emit, rows)) as loop:
        row = builder.mul(loop.index, index(emit.factors))
        line = emit.at(emit.pointer(source), builder.mul(row, row_stride))
        copy = emit.at(emit.pointer(target), builder.mul(row, width))
        emit.copy_factors(line, row_stride, builder.sub(rows, row), masks, copy)
        if early:
            emit.prefetch_span(emit.at(line, builder.mul(row_stride, index(early))), vectors, level=2)


def _products(emit: Vectors, depth):
    """How many products sum up so many factors: whole steps of AMX's, where it multiplies pairs."""
    builder, step = emit.builder, STEP if CHOSEN.matrices and emit.factors > 1 else emit.factors
    return builder.mul(builder.udiv(builder.add(depth, index(step - 1)), index(step)), index(step // emit.factors))


@intrinsic
def _transpose_columns(typing_context, dtype, depth, columns, source, column_stride, panel):
    """The panel of a source whose rows lie side by side."""

    def codegen(context, builder, signature, arguments):
        _, depth, columns, source, column_stride, panel = arguments
        emit = vectors_of(builder, signature)
        lanes = index(emit.lanes)
        with cgutils.for_range(builder, builder.sdiv(builder.add(depth, index(emit.lanes - 1)), lanes)) as loop:
            k = builder.mul(loop.index, lanes)
            rows_left = builder.sub(depth, k)
            for first in range(0, CHOSEN.vectors * emit.lanes, emit.lanes):
                _transpose_square(emit, k, rows_left, columns, first, source, column_stride, panel)
        return context.get_dummy_value()

    return types.void(dtype, *[types.intp] * 5), codegen


def _transpose_square(emit: Vectors, k, rows_left, columns, first: int, source, column_stride, panel) -> None:
    """Columns first .. first + lanes of rows k .. k + lanes: loaded a column a vector, stored a row a vector."""
    builder = emit.builder
    square = []
    for j in range(first, first + emit.lanes):
        inside = builder.icmp_signed("<", index(j), columns)
        mask = emit.mask(builder.select(inside, rows_left, index(0)))
        line = emit.at(emit.pointer(source), builder.add(builder.mul(column_stride, index(j)), k))
        square.append(emit.load(line, mask))
        emit.prefetch(emit.at(line, index(BYTES_AHEAD // emit.itemsize)))
    for i, row in enumerate(transposed(builder, square)):
        with builder.if_then(builder.icmp_signed("<", index(i), rows_left)):
            at = builder.mul(builder.add(k, index(i)), index(CHOSEN.vectors * emit.lanes))
            emit.store(row, emit.at(emit.pointer(panel), builder.add(at, index(first))))


@kernel
def whole_depth(dtype, depth):
    """The depth, up to whole products, of which AMX computes some at once."""
    step = STEP if terms(dtype) > 0 else factors(dtype)
    return ceil_div(depth, step) * step


@kernel
def panel_length(dtype, depth):
    """Elements of one panel of the kernel."""
    if terms(dtype) > 1:
        return split_bytes(1, depth) // size_of(dtype)
    return whole_depth(dtype, depth) * gemm_columns(dtype)


@kernel
def pack_panel(dtype, depth, columns, source, row_stride, column_stride, panel):
    """Fills one panel. Assumes: one of the strides is 1, of bfloat16 that of columns."""
    if MATRICES and terms(dtype) > 1:
        if column_stride == 1:
            split_panel(dtype, depth, columns, source, row_stride * size_of(dtype), panel)
        else:
            split_transposed_panel(depth, columns, source, column_stride * size_of(dtype), panel)
    elif column_stride == 1:
        _copy_rows(dtype, depth, columns, source, row_stride, panel)
    else:
        _transpose_columns(dtype, depth, columns, source, column_stride, panel)


@kernel
def packed_length(dtype, depth, filters):
    """Elements of a kernel `[depth,filters]` packed into panels."""
    return ceil_div(filters, gemm_columns(dtype)) * panel_length(dtype, depth)


@parallel_kernel
def pack(dtype, worker, workers, depth, filters, source, row_stride, column_stride, target):
    """A worker's share of the panels of a kernel `[depth,filters]` that has those strides.

    Parallel over: panels.
    """
    itemsize = size_of(dtype)
    width = gemm_columns(dtype)
    length = panel_length(dtype, depth)
    first, last = share(ceil_div(filters, width), worker, workers)
    if column_stride == 1 and terms(dtype) <= 1:
        whole = min(last, filters // width)
        for panel in range(first, whole, PANELS_AT_ONCE):
            count = min(PANELS_AT_ONCE, whole - panel)
            at, packed = source + panel * width * itemsize, target + panel * length * itemsize
            _copy_panels(dtype, depth, count, at, row_stride, packed)
        first = max(first, whole)
    for panel in range(first, last):
        columns = min(width, filters - panel * width)
        at = source + panel * width * column_stride * itemsize
        pack_panel(dtype, depth, columns, at, row_stride, column_stride, target + panel * length * itemsize)
