"""The machine's fused multiply-add peak: the arithmetic rate that no kernel can pass.

Run as a program, in a process of its own: `python peak.py THREADS` prints one JSON object,
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


def _fma_loop(lanes: int, chains: int):
    vector, i64 = ir.VectorType(ir.FloatType(), lanes), ir.IntType(64)

    @intrinsic
    def loop(typing, address, steps):
        """sum over chains and lanes of acc[i] += v * load(address + 4*lanes*(step mod BUFFER_VECTORS))"""

        def codegen(context, builder, signature, arguments):
            address, steps = arguments
            name = f"llvm.fma.v{lanes}f32"
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
            base = builder.inttoptr(address, vector.as_pointer())
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
                total.add_incoming(builder.call(fma, [fixed, loaded, total]), body)
            last = [total.incomings[1][0] for total in sums]
            builder.cbranch(builder.icmp_signed("<", after, steps), body, done)
            builder.position_at_end(done)
            total = last[0]
            for value in last[1:]:
                total = builder.fadd(total, value)
            return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return types.float32(types.intp, types.intp), codegen

    return loop


def measure(threads: int, series: int = 5, repeats: int = 20) -> float:
    """GFLOP/s of `threads` threads, each on its own chains: the highest of some medians, lest a busy moment count."""
    lanes, chains = vector_shape()
    loop = _fma_loop(lanes, chains)

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
    return 2.0 * threads * STEPS * lanes * chains / seconds / 1e9


if __name__ == "__main__":
    counts = sorted({1, int(sys.argv[1])})
    print(json.dumps({"lanes": vector_shape()[0], "gflops": {str(count): measure(count) for count in counts}}))
