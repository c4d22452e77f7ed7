"""The micro-kernels are compiled to what they are written for: registers full of sums, and none of them in memory."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastsepconv.kernels.cpu import gemm_tile
from fastsepconv.kernels.cpu.tiles import TILES

from ..targets import environment_of

FUNCTIONS = (
    "gemm._multiply_panel",
    "pointwise._gradient_panel",
    "depthwise_line._slide",
    "depthwise_line._slide_wide",
    "depthwise_line._tiles",
    "depthwise_gradients._correlate_columns",
)
REGISTERS = {"avx512": "zmm", "avx2": "ymm"}
# A core that starts five or six instructions a cycle starts two fused multiply-adds; Zen 4 one of those of 512 bits.
# Where another thread shares the core it starts half as many: then each that is no multiply-add costs time.
INSTRUCTIONS_A_PRODUCT = {"avx512": 1.45, "avx2": 1.85, "bfloat16": 1.7}

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are tiles of x86")


@functools.cache
def loops_of(target: str, dtype: str = "float32", functions: tuple[str, ...] = FUNCTIONS) -> dict[str, list[dict]]:
    command = [sys.executable, "-m", "tests.kernels.inner_loops", dtype, *functions]
    root = Path(__file__).parents[2]
    process = subprocess.run(command, cwd=root, env=environment_of(target), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", REGISTERS)
@pytest.mark.parametrize("function", ["gemm._multiply_panel", "pointwise._gradient_panel"])
def test_the_product_runs_at_the_speed_of_its_arithmetic(target, function):
    tile = next(tile for tile in TILES if tile.name == target)
    turn = tile.rows[0] * tile.vectors * tile.unroll
    whole = [loop for loop in loops_of(target)[function] if loop["fused"] == turn]
    assert whole, "no loop holds the whole tile's products"
    assert max(loop["instructions"] for loop in whole) <= INSTRUCTIONS_A_PRODUCT[target] * turn


def test_a_product_of_bfloat16_is_one_instruction_for_two_of_float32():
    loops = loops_of("bfloat16", "bfloat16", ("gemm._multiply_panel", "depthwise_line._slide"))
    tile = next(tile for tile in TILES if tile.name == "avx512")
    turn = tile.rows[0] * tile.vectors * tile.unroll
    whole = [loop for loop in loops["gemm._multiply_panel"] if loop["fused"] == turn]
    assert whole, "no loop holds the whole tile's products"
    assert max(loop["instructions"] for loop in whole) <= INSTRUCTIONS_A_PRODUCT["bfloat16"] * turn
    for function, found in loops.items():
        assert found and not [loop for loop in found if loop["spills"] and not loop["masked"]], function


@pytest.mark.parametrize("target", REGISTERS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_spilled(target, function):
    loops = loops_of(target)[function]
    assert loops and {kind for loop in loops for kind in loop["registers"]} == {REGISTERS[target]}
    spilled = [loop for loop in loops if loop["spills"] and not loop["masked"]]
    assert not spilled, "vectors of an inner loop lie in memory"


@pytest.mark.parametrize("target", REGISTERS)
def test_a_loop_holds_every_height_of_the_tile(target):
    tile = next(tile for tile in TILES if tile.name == target)
    found = Counter(loop["fused"] for loop in loops_of(target)["gemm._multiply_panel"])
    for rows in tile.rows:
        product = rows * tile.vectors
        turn = product * tile.unroll
        loop = turn if found[turn] else product * gemm_tile.STRETCH  # the compiler writes out a stretch of few rows
        assert found[loop], f"no loop for {rows} rows"
        found[loop] -= 1
    assert gemm_tile.SUMMED_AT_ONCE % gemm_tile.STRETCH == 0
    assert gemm_tile.STRETCH % tile.unroll == 0 and gemm_tile.STRETCH % tile.ask_step == 0
