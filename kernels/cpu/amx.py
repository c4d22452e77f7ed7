"""Intel's AMX: eight registers of 16 rows of 64 bytes, and an instruction that multiplies two into a third.

It multiplies pairs of bfloat16 and sums in float32. A float32 goes in as the sum of three bfloat16 that it is, `high +
middle + low`: see `amx_packing`. Intel's manual, volume 1, chapter 18, tells of the registers.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import CACHE_LINE, index
from .tiles import CHOSEN

SIDE = 32  # rows and columns of a product: two registers
STEP = 32  # elements of the depth that a register holds
ROWS = 16
STEP_BYTES = 2048  # of either side of a product, for each of its terms
_BYTE = ir.IntType(8)

# What emits AMX's code is called behind `if MATRICES`: what stands behind a constant that is false, Numba leaves out
# before it compiles. Functions called by address (`compiled_once`) say for which dtypes they are not there.
MATRICES = CHOSEN.matrices
_TERMS = {types.float32: 3, types.uint16: 1} if MATRICES else {}
MULTIPLIED = frozenset(_TERMS)
OTHERS = frozenset({types.float32, types.float64, types.uint16}) - MULTIPLIED


def terms_of(dtype: types.NumberClass) -> int:
    """How many bfloat16 stand for an element; 0 where AMX is not used for it."""
    return _TERMS.get(dtype.instance_type, 0)


def emit_call(builder, name: str, *arguments) -> None:
    """An instruction by LLVM's name for it. Integers are numbers of registers."""
    values = [ir.Constant(_BYTE, each) if isinstance(each, int) else each for each in arguments]
    function = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), values)


def pointer(builder, address):
    """The pointer at an integer address, as those instructions take it."""
    return builder.inttoptr(address, _BYTE.as_pointer())


@intrinsic
def terms(typing_context, dtype):
    """How many bfloat16 stand for an element of `dtype` in AMX's registers; 0 where they are not used for it."""

    def codegen(context, builder, signature, arguments):
        return index(terms_of(signature.args[0]))

    return types.intp(dtype), codegen


@intrinsic
def begin_tiles(typing_context, dtype):
    """Sets this thread's registers up, all eight alike, and clears them."""

    def codegen(context, builder, signature, arguments):
        if terms_of(signature.args[0]):
            palette, columns, rows = [1] + [0] * 15, [CACHE_LINE, 0] * 8 + [0] * 16, [ROWS] * 8 + [0] * 8
            layout = ir.Constant(ir.ArrayType(_BYTE, CACHE_LINE), bytearray(palette + columns + rows))
            place = cgutils.global_constant(builder, "amx_layout", layout)
            emit_call(builder, "ldtilecfg", builder.bitcast(place, _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(dtype), codegen


@intrinsic
def end_tiles(typing_context, dtype):
    """Gives the registers back: the system need not save them any more."""

    def codegen(context, builder, signature, arguments):
        if terms_of(signature.args[0]):
            emit_call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(dtype), codegen
