"""The peak's loop does the arithmetic that it is credited with, in the vectors of the target."""

from __future__ import annotations

import re
import subprocess
import sys

import numba
import numpy as np
import pytest

from fastsepconv.bench import machine, peak

from ..targets import environment_of

PAIRS = [
    False,
    pytest.param(
        True, marks=pytest.mark.skipif(not peak.multiplies_pairs("bfloat16"), reason="the CPU has no AVX512_BF16")
    ),
]


def compiled(lanes, chains, pairs=False):
    loop = peak._fma_loop(lanes, chains, pairs)

    @numba.njit
    def run(address, steps):
        return loop(address, steps)

    return run


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_every_chain_takes_every_step(steps, pairs):
    lanes, chains = peak.vector_shape()
    buffer = np.full(peak.BUFFER_VECTORS * lanes, 0.5, np.float32)
    if pairs:
        buffer.view(np.uint16)[:] = 0x3F00  # 0.5 in either half of a lane
    start = sum(range(chains))
    products = chains * steps * 0.25 * (1 + pairs)
    assert compiled(lanes, chains, pairs)(buffer.ctypes.data, steps) == start + products


@pytest.mark.parametrize("pairs", PAIRS)
def test_the_loop_is_one_instruction_a_chain_and_spills_nothing(pairs):
    lanes, chains = peak.vector_shape()
    run = compiled(lanes, chains, pairs)
    run(np.ones(peak.BUFFER_VECTORS * lanes, np.float32).ctypes.data, 1)
    (assembly,) = run.inspect_asm().values()
    if lanes == 4:
        pytest.skip("the target has no vfmadd instructions")
    register = {16: "zmm", 8: "ymm"}[lanes]
    fused = re.findall(rf"{'vdpbf16ps' if pairs else r'vfmadd[0-9]+ps'}\s+.*%{register}\d+", assembly)
    assert fused and len(fused) % chains == 0, "in the function, and again where a wrapper inlines it"
    assert not any("(%rsp)" in line for line in fused)


@pytest.mark.skipif(not peak.multiplies_tiles("bfloat16"), reason="the CPU has no AMX, or the system keeps it back")
@pytest.mark.parametrize("steps", [1, 1000])
def test_every_step_multiplies_the_tiles(steps):
    tiles = np.full(1024 * peak.TILES // 2, 0x3F00, np.uint16)  # 0.5
    assert peak.run_tiles(tiles.ctypes.data, steps) == steps * 32 * 0.25
    (assembly,) = peak.run_tiles.inspect_asm().values()
    sums = re.findall(r"\ttdpbf16ps\t.*tmm(\d)\n", assembly)
    assert sums and sums == ["0", "1", "2", "3"] * (len(sums) // 4), "more than once where the loop is unrolled"


def test_the_vectors_are_those_of_the_target():
    code = "from fastsepconv.bench import peak; print(*peak.vector_shape())"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=environment_of("avx2"), capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["8", "12"]


def test_the_peak_is_told_for_one_thread_and_for_all():
    measured = machine.peak(2)
    assert measured.keys() == {"1", "2"} and min(measured.values()) > 0
    assert machine.higher({"1": 2.0, "2": 3.0}, {"1": 1.0, "2": 4.0}) == {"1": 2.0, "2": 4.0}


def test_the_machine_is_described():
    facts = machine.describe()
    assert facts["cpu"] and facts["cores"] == machine.available_cores() >= 1
