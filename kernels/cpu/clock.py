"""The system's clocks, for compiled code on Linux."""

from __future__ import annotations

import ctypes
import sys
import time

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .atomics import WORD
from .jit import kernel

if sys.platform == "linux":
    llvm.add_symbol("fastsepconv_clock_gettime", ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value)


@kernel
def monotonic_ns():
    """Nanoseconds on a clock that never goes back."""
    return _nanoseconds(time.CLOCK_MONOTONIC)


@kernel
def process_ns():
    """Nanoseconds that this process's threads ran; of another thread than the caller's those before its last tick."""
    return _nanoseconds(time.CLOCK_PROCESS_CPUTIME_ID)


@intrinsic
def _nanoseconds(typing_context, clock):
    """What a clock shows."""

    def codegen(context, builder, signature, arguments):
        now = cgutils.alloca_once(builder, WORD, size=WORD(2))
        declared = ir.FunctionType(ir.IntType(32), [WORD, WORD.as_pointer()])
        clock_gettime = cgutils.get_or_insert_function(builder.module, declared, "fastsepconv_clock_gettime")
        builder.call(clock_gettime, [*arguments, now])
        seconds, nanoseconds = (builder.load(builder.gep(now, [WORD(i)])) for i in range(2))
        return builder.add(builder.mul(seconds, WORD(10**9)), nanoseconds)

    return types.intp(types.intp), codegen
