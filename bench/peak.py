"""The machine's fused multiply-add peak: the arithmetic rate that no kernel can pass.

For bfloat16 that of its dot product, two multiply-adds in one, where the CPU has that; else float32's, as which it is
computed there. Run as a program, in a process of its own: `python peak.py THREADS DTYPE` prints one JSON object,
{"lanes": ..., "gflops": {"1": ..., "THREADS": ...}}.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

STEPS = 1 << 21  # some milliseconds
BUFFER_VECTORS = 32  # 2 KB: sits in L1


def _target_features() -> str:
    """What Numba compiles for, `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` heeded."""
    return cpu_target.target_context.codegen().magic_tuple()[2]


def vector_shape() -> tuple[int, int]:
    """(lanes, accumulators): enough independent chains to hide the latency, few enough for the register file."""
    features = _target_features()
    if "+avx512f" in features:
        return 16, 24
    return (8, 12) if "+fma" in features else (4, 24)


class _BFloat16(ir.Type):
    """LLVM's type of that name, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


def multiplies_pairs(dtype: str) -> bool:
    """Whether one instruction multiplies and adds two elements of either side in each lane."""
    return dtype == "bfloat16" and "+avx512bf16" in _target_features()


def _fma_loop(lanes: int, chains: int, pairs: bool = False):
    vector, i64 = ir.VectorType(ir.FloatType(), lanes), ir.IntType(64)
    factors = ir.VectorType(_BFloat16(), 2 * lanes) if pairs else vector

    @intrinsic
    def loop(typing, address, steps):
        """sum over chains and lanes of acc[i] += v * load(address + 4*lanes*(step mod BUFFER_VECTORS))

        With `pairs` the 32 bits of a lane are two factors of bfloat16.
        """

        def codegen(context, builder, signature, arguments):
            address, steps = arguments
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}" if pairs else f"llvm.fma.v{lanes}f32"
            parameters = [vector, factors, factors] if pairs else [vector] * 3
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, parameters), name)
            base = builder.inttoptr(address, factors.as_pointer())
            fixed = builder.load(base, align=4)
            entry, body, done = builder.block, builder.append_basic_block("fma"), builder.append_basic_block("done")
            builder.branch(body)
            builder.position_at_end(body)
            step = builder.phi(i64)
            step.add_incoming(ir.Constant(i64, 0), entry)
            sums = [builder.phi(vector) for _ in range(chains)]
            slot = builder.and_(step, ir.Constant(i64, BUFFER_VECTORS - 1))
            loaded = builder.load(builder.gep(base, [slot]), align=4)
            after = builder.add(step, ir.Constant(i64, 1))
            step.add_incoming(after, body)
            for index, total in enumerate(sums):
                total.add_incoming(ir.Constant(vector, [float(index)] * lanes), entry)
                operands = [total, fixed, loaded] if pairs else [fixed, loaded, total]
                total.add_incoming(builder.call(fma, operands), body)
            last = [total.incomings[1][0] for total in sums]
            builder.cbranch(builder.icmp_signed("<", after, steps), body, done)
            builder.position_at_end(done)
            total = last[0]
            for value in last[1:]:
                total = builder.fadd(total, value)
            return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return types.float32(types.intp, types.intp), codegen

    return loop


def measure(threads: int, dtype: str = "float32", series: int = 5, repeats: int = 20) -> float:
    """GFLOP/s of `threads` threads, each on its own chains: the highest of some medians, lest a busy moment count."""
    lanes, chains = vector_shape()
    pairs = multiplies_pairs(dtype)
    loop = _fma_loop(lanes, chains, pairs)

    @numba.njit(parallel=True)
    def run(address, steps, sums):
        for thread in numba.prange(sums.size):
            sums[thread] = loop(address, steps)

    numba.set_num_threads(threads)
    buffer, sums = np.ones(BUFFER_VECTORS * lanes, np.float32), np.zeros(threads, np.float32)
    run(buffer.ctypes.data, 2, sums)

    def timed() -> float:
        start = time.perf_counter()
        run(buffer.ctypes.data, STEPS, sums)
        return time.perf_counter() - start

    seconds = min(median(timed() for _ in range(repeats)) for _ in range(series))
    return 2.0 * (1 + pairs) * threads * STEPS * lanes * chains / seconds / 1e9


if __name__ == "__main__":
    counts = sorted({1, int(sys.argv[1])})
    rates = {str(count): measure(count, sys.argv[2]) for count in counts}
    print(json.dumps({"lanes": vector_shape()[0], "gflops": rates}))
