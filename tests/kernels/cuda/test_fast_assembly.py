"""The fast kernels assemble without a card, spill nothing, and hold the instructions they are written for.

They leave room on a multiprocessor for the blocks they promise. The whole table takes minutes, so it carries a digest
of the sources it was made from; here one tile of each kernel and dtype is assembled anew and held against it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

from fastsepconv.kernels.cuda import pointwise_tensor, tiles
from tests.kernels.cuda import assembly, fast_assembly

if assembly.assembler() is None:
    pytest.skip("ptxas is not installed: pip install --group test", allow_module_level=True)

COMMITTED = json.loads(fast_assembly.TABLE.read_text())
ROWS = COMMITTED["kernels"]
SAME_TOOLS = fast_assembly.versions() in COMMITTED["versions"].values()
REGISTERS = 65536  # of a multiprocessor
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}  # of a multiprocessor; a block takes 1 KB beyond what it asks for
SAMPLE = [
    name
    for name in ROWS
    if not name.startswith("pointwise") or name.endswith("small")
    if not name.endswith("relu") and not name.endswith(("rows64", "rows128"))
]


@pytest.fixture(scope="module")
def assembled() -> dict[str, dict]:
    """The sample's rows, from a process of its own, in which Numba compiles whatever this one simulates."""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    command = [sys.executable, "-m", "tests.kernels.cuda.fast_assembly", *SAMPLE]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not SAME_TOOLS, reason="the table was made with other versions of Numba's compiler or NVIDIA's")
def test_the_table_was_made_from_these_sources():
    rewrite = "run `python -m tests.kernels.cuda.fast_assembly`"
    assert list(ROWS) == [name for name, _ in fast_assembly.kernels()], rewrite
    assert COMMITTED["sources"] == fast_assembly.sources(), rewrite


def test_the_table_is_that_of_every_toolkit():
    assert sorted(COMMITTED["versions"]) == sorted(fast_assembly.TOOLKITS)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_kernel_assembles_to_what_the_table_says(name, assembled):
    check(name, assembled[name])
    if SAME_TOOLS:
        assert assembled[name] == ROWS[name]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_is_sound(name):
    check(name, ROWS[name])


def check(name: str, row: dict) -> None:
    threads, blocks = row["bounds"]
    for capability in fast_assembly.CAPABILITIES:
        found = row[capability]
        assert found["stack"] == found["spilled"] == 0, f"{name} keeps registers in memory on {capability}"
        assert found["static_shared"] == 0
        assert blocks * threads * (-(-found["registers"] // 8) * 8) <= REGISTERS
    operation = name.split()[0]
    if operation in ("pointwise", "separable"):
        assert row["products"] > 0
        assert row["copies"] > 0
        assert (row["matrices"] == 0) == ("kernel_gradient" in name and ("float32" in name or "tf32" in name))
        assert (row["wide_stores"] == 0) == ("unaligned" in name)
    if operation == "separable" or (operation == "depthwise" and ("forward" in name or "float32" in name)):
        assert row["wide_loads"] > 0


@pytest.mark.parametrize("dtype", tiles.POINTWISE)
def test_the_blocks_of_a_multiprocessor_share_its_memory(dtype):
    makers = (pointwise_tensor.forward, pointwise_tensor.input_gradient, pointwise_tensor.kernel_gradient)
    for tile in tiles.POINTWISE[dtype]:
        for make in makers:
            sizes = (1, 1, 1, 1) if make is pointwise_tensor.kernel_gradient else (1, 1)
            launch = make(dtype, tile).launch(*sizes)
            assert all(tile.blocks * (launch.shared_bytes + 1024) <= room for room in SHARED.values()), tile.name
