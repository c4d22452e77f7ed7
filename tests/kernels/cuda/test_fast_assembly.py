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
from fastsepconv.kernels.nvidia import LEAST_CAPABILITY
from tests.kernels.cuda import assembly, fast_assembly

if assembly.assembler() is None:
    pytest.skip("ptxas is not installed: pip install --group test", allow_module_level=True)

COMMITTED = json.loads(fast_assembly.TABLE.read_text())
ROWS = COMMITTED["kernels"]
SAME_TOOLS = fast_assembly.versions() in COMMITTED["versions"].values()
REGISTERS = 65536  # of a multiprocessor
SHARED = {
    "sm_80": 164 * 1024,
    "sm_90": 228 * 1024,
    "sm_90a": 228 * 1024,
}  # of a multiprocessor; a block takes 1 KB beyond what it asks for
TILES = [
    pytest.param(dtype, tile, id=f"{dtype}-{tile.name}")
    for dtype, found in [*tiles.POINTWISE.items(), *tiles.WARPGROUP_POINTWISE.items()]
    for tile in found
]
LEFT_OUT = ("_relu", "rows64", "rows128")
SAMPLED_PRODUCTS = (",small]", "[bfloat16,warpgroups256]", "[tf32,warpgroups256]")
SAMPLE = [
    name
    for name in ROWS
    if not (
        any(part in name for part in LEFT_OUT) or (name.startswith("pointwise") and not name.endswith(SAMPLED_PRODUCTS))
    )
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
    by_warpgroups = "warpgroups" in name
    for capability in fast_assembly.CAPABILITIES[tiles.HOPPER if by_warpgroups else LEAST_CAPABILITY]:
        found = row[capability]
        assert found["stack"] == found["spilled"] == 0, f"{name} keeps registers in memory on {capability}"
        assert found["remarks"] == 0
        assert found["static_shared"] == 0
        assert blocks * threads * (-(-found["registers"] // 8) * 8) <= REGISTERS
    operation = name.partition("_")[0]
    if operation in ("pointwise", "separable"):
        assert row["products"] > 0
        assert row["copies"] > 0
        by_elements = "kernel_gradient" in name and ("float32" in name or "tf32" in name)
        assert (row["matrices"] == 0) == (by_elements or by_warpgroups)
        assert (row["wide_stores"] == 0) == ("unaligned" in name)
    if operation == "separable" or (operation == "depthwise" and ("forward" in name or "float32" in name)):
        assert row["wide_loads"] > 0


@pytest.mark.parametrize(("dtype", "tile"), TILES)
def test_the_blocks_of_a_multiprocessor_share_its_memory(dtype, tile):
    for make in pointwise_tensor.factories(dtype, tile):
        sizes = (1, 1, 1, 1) if make is pointwise_tensor.kernel_gradient else (1, 1)
        size = tile.blocks * (make(dtype, tile).launch(*sizes).shared_bytes + 1024)
        assert all(size <= SHARED[capability] for capability in fast_assembly.CAPABILITIES[tile.architecture])


@pytest.mark.parametrize("dtype", tiles.WARPGROUP_POINTWISE)
def test_what_keeps_products_from_running_beside_the_threads_is_remarked(dtype):
    name, kernel = next(found for found in fast_assembly.kernels() if f"[{dtype},warpgroups128]" in found[0])
    text = fast_assembly.compiled(kernel)
    assert fast_assembly.assemble(text, "sm_90a")["remarks"] == 0, name
    unordered = text.replace("wgmma.fence.sync.aligned;", "")
    assert fast_assembly.assemble(unordered, "sm_90a")["remarks"] > 0
