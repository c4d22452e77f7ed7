"""A tile of a matrix product that copies the next panel of the kernel meanwhile.

A panel that is packed as it is used is read within one tile, faster than memory gives it, and then memory has nothing
to do for all the other tiles. Copied while the panel before it is used, a few rows with every few products, it is
asked for evenly: with weights from memory 10x10x1024-1536 and 10x10x1536-2048 take 0.85 to 0.9 times as long, from L3
the same (Zen 5; its AVX2 tile 0.88 to 0.94, and 0.93).
"""

from __future__ import annotations

from numba.core import cgutils, types
from numba.extending import intrinsic

from .gemm_tile import GEMM_ROWS, emit_tile
from .simd import Vectors, arithmetic_type, index, vectors_of
from .tiles import CHOSEN

COPIED_EARLY = 32  # rows from being asked for to being copied: more than memory takes to answer


@intrinsic
def copying_tile(
    typing_context, dtype, depth, a, a_row, b, start, start_row, residual_offset, c, c_row, past_caches, low, high,
    source, source_step, panel, copies,
):  # fmt: skip
    """A whole `gemm_tile` of the highest height, of rows of a and a packed b, with a_step 1.

    Meanwhile rows at `source`, source_step apart and as wide as the tile, are copied into `panel`: `copies` with every
    STRETCH products, and those COPIED_EARLY rows on are asked for in L2. Not for bfloat16.
    """

    def codegen(context, builder, signature, arguments):
        _, depth, a, a_row, b, *rest, source, source_step, panel, copies = arguments
        emit = vectors_of(builder, signature)
        rows, columns, none = index(GEMM_ROWS[0]), index(CHOSEN.vectors * emit.lanes), index(0)
        emit_tile(
            emit, GEMM_ROWS[0], rows, columns, depth, a, a_row, index(1), b, columns, none, source, source_step, *rest,
            copied=_Copied(emit, source, source_step, panel, copies),
        )  # fmt: skip
        return context.get_dummy_value()

    bound = arithmetic_type(dtype)
    return types.void(dtype, *[types.intp] * 10, bound, bound, *[types.intp] * 4), codegen


@intrinsic
def ask_for_rows(typing_context, dtype, source, source_step):
    """Asks for the rows of `source` that `copying_tile` copies before it reaches those that it has asked for."""

    def codegen(context, builder, signature, arguments):
        _, source, source_step = arguments
        emit = vectors_of(builder, signature)
        with cgutils.for_range(builder, index(COPIED_EARLY)) as row:
            _ask_for_row(emit, emit.at(emit.pointer(source), builder.mul(row.index, source_step)))
        return context.get_dummy_value()

    return types.void(dtype, types.intp, types.intp), codegen


class _Copied:
    """Rows that become a panel, copied some with each stretch: a little at a time is what memory gives soonest."""

    def __init__(self, emit: Vectors, source, source_step, panel, copies) -> None:
        builder = emit.builder
        self.emit, self.step, self.copies = emit, source_step, copies
        self.source = cgutils.alloca_once_value(builder, emit.pointer(source))
        self.target = cgutils.alloca_once_value(builder, emit.pointer(panel))

    def copy_some(self) -> None:
        """A stretch's rows."""
        emit, builder = self.emit, self.emit.builder
        with cgutils.for_range(builder, self.copies):
            line, target = builder.load(self.source), builder.load(self.target)
            for j in range(CHOSEN.vectors):
                emit.store(emit.load(emit.at(line, index(j * emit.lanes))), emit.at(target, index(j * emit.lanes)))
            _ask_for_row(emit, emit.at(line, builder.mul(self.step, index(COPIED_EARLY))))
            builder.store(emit.at(line, self.step), self.source)
            builder.store(emit.at(target, index(CHOSEN.vectors * emit.lanes)), self.target)


def _ask_for_row(emit: Vectors, line) -> None:
    """Asks for a row as wide as the tile, which may reach into one line more than it has vectors."""
    emit.prefetch_span(line, CHOSEN.vectors, level=2)
    emit.prefetch(emit.at(line, index(CHOSEN.vectors * emit.lanes - 1)))
