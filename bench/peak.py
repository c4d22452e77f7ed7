"""The machine's fused multiply-add peak: the arithmetic rate that no kernel can pass.

For bfloat16 that of AMX's products, or of its dot product, two multiply-adds in one, where the CPU has those; else
float32's, as which it is computed there. AMX may pass float32's, which is that of multiply-adds: it multiplies float32
in three terms of bfloat16 each. Run as a program, in a process of its own: `python peak.py THREADS DTYPE` prints one
JSON object, {"lanes": ..., "gflops": {"1": ..., "THREADS": ...}}.
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

from fastsepconv.kernels.cpu import amx
from fastsepconv.kernels.cpu.amx import emit_call

STEPS = 1 << 21  # some milliseconds
BUFFER_VECTORS = 32  # 2 KB: sits in L1
TILE_STEPS = 1 << 17
TILES = 4  # of 1 KB each: as many as are loaded for as many products


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


def multiplies_tiles(dtype: str) -> bool:
    """Whether AMX does."""
    return dtype == "bfloat16" and amx.terms_of(types.NumberClass(types.uint16)) > 0


@intrinsic
def _tile_loop(typing, address, steps):
    """sums[i][j] += a[i] . b[j] for the two a and the two b at the address, all of them tiles, loaded at each step.

    Returns the first of all sums. The room of the tiles is written over.
    """

    def codegen(context, builder, signature, arguments):
        address, steps = arguments
        stride = ir.Constant(ir.IntType(64), 64)
        places = [builder.add(address, ir.Constant(ir.IntType(64), 1024 * tile)) for tile in range(TILES)]
        for number in range(TILES):
            emit_call(builder, "tilezero", number)
        with cgutils.for_range(builder, steps):
            for number, place in enumerate(places):
                emit_call(builder, "tileloadd64", TILES + number, amx.pointer(builder, place), stride)
            for number in range(TILES):
                emit_call(builder, "tdpbf16ps", number, TILES + number // 2, TILES + 2 + number % 2)
        emit_call(builder, "tilestored64", 0, amx.pointer(builder, address), stride)
        return builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))

    return types.float32(types.intp, types.intp), codegen


@numba.njit
def run_tiles(address, steps):
    """That loop, with the registers set up for it."""
    amx.begin_tiles(np.uint16)
    first = _tile_loop(address, steps)
    amx.end_tiles(np.uint16)
    return first


def measure(threads: int, dtype: str = "float32", series: int = 5, repeats: int = 20) -> float:
    """GFLOP/s of `threads` threads, each on its own chains: the highest of some medians, lest a busy moment count."""
    lanes, chains = vector_shape()
    pairs, tiles = multiplies_pairs(dtype), multiplies_tiles(dtype)
    loop, steps = _fma_loop(lanes, chains, pairs), STEPS
    operations = 2.0 * (1 + pairs) * lanes * chains
    if tiles:
        loop, steps, operations = run_tiles, TILE_STEPS, 2.0 * TILES * 16 * 16 * 32

    @numba.njit(parallel=True)
    def run(addresses, steps, sums):
        for thread in numba.prange(sums.size):
            sums[thread] = loop(addresses[thread], steps)

    numba.set_num_threads(threads)
    # Numbers of all kinds: with zeros AMX is a third faster, since it takes less power.
    buffers = np.random.default_rng(0).standard_normal((threads, 1024 * TILES // 4 + 32)).astype(np.float32)
    buffers.view(np.uint16)[:, ::2] = buffers.view(np.uint16)[:, 1::2]  # of bfloat16 as well
    # From a cache line on: rows of tiles that lie in two are loaded half as fast.
    addresses = -(-(buffers.ctypes.data + np.arange(threads) * buffers.strides[0]) // 64) * 64
    sums = np.zeros(threads, np.float32)
    run(addresses, 2, sums)

    def timed() -> float:
        start = time.perf_counter()
        run(addresses, steps, sums)
        return time.perf_counter() - start

    seconds = min(median(timed() for _ in range(repeats)) for _ in range(series))
    return operations * threads * steps / seconds / 1e9


if __name__ == "__main__":
    counts = sorted({1, int(sys.argv[1])})
    rates = {str(count): measure(count, sys.argv[2]) for count in counts}
    print(json.dumps({"lanes": vector_shape()[0], "gflops": rates}))
