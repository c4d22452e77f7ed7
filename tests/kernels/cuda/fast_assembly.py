"""What every kernel of the fast tier assembles to, for each tile of the tables, in fast_assembly.json.

`python -m tests.kernels.cuda.fast_assembly` rewrites the file, in some minutes; with names of kernels it prints their
rows instead. It needs numba-cuda and NVIDIA's assembler (cuda-toolkit[nvcc]), and no card. The rows are those of each
toolkit that the file names: run it with CUDA 12 (.venv-cuda12, from `make test-cuda12`) and with CUDA 13.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from numba import cuda

from fastsepconv.kernels.cuda import (
    channel_vectors,
    depthwise_window,
    fragments,
    gemm_tile,
    partial_sums,
    pointwise_tensor,
    ptx,
    separable_rows,
    tiles,
    transposition,
    warpgroup_tile,
)
from fastsepconv.kernels.cuda.fast_kernels import ELEMENTS, made
from fastsepconv.kernels.nvidia import LEAST_CAPABILITY
from tests.kernels.cuda.assembly import assembler

TABLE = Path(__file__).with_name("fast_assembly.json")
TOOLKITS = ("cuda12", "cuda13")
TOOLS = ("numba-cuda", "llvmlite", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12")
CAPABILITIES = {LEAST_CAPABILITY: ("sm_80", "sm_90"), tiles.HOPPER: ("sm_90a",)}  # by what kernels are made of
INSTRUCTIONS = {
    "products": r"w?g?mma\.(?:sync|mma_async)",
    "copies": r"cp\.async\.c[ag]\.shared",
    "matrices": r"ldmatrix",
    "wide_loads": r"ld\.global\.nc\.v4",
    "wide_stores": r"st\.global\.v4",
}

Maker = Callable[..., tiles.TiledKernel]


def makers(capability: tuple[int, int] = tiles.HOPPER[:2]) -> Iterator[tuple[Maker, tuple]]:
    """What makes each kernel that cards of this capability run, `make(*which)`, those first that take longest.

    Every dtype and tile of the tables is here; cards of Hopper's capability run all.
    """
    for dtype, gemm in itertools.product(("bfloat16", "float16"), tiles.SEPARABLE_GEMMS):
        for window in tiles.forward_windows(dtype):
            yield separable_rows.forward, (dtype, tiles.SeparableTile(gemm, window))
    for dtype in ELEMENTS:
        for window in tiles.GRADIENT_WINDOWS.values():
            yield depthwise_window.backward, (dtype, window)
        for window in tiles.forward_windows(dtype):
            yield depthwise_window.forward, (dtype, window)
    warpgroups = tiles.WARPGROUP_POINTWISE if capability == tiles.HOPPER[:2] else {}
    for dtype, found in (*tiles.POINTWISE.items(), *warpgroups.items()):
        for tile in found:
            for make in pointwise_tensor.factories(dtype, tile):
                yield make, (dtype, tile)
    if warpgroups:
        yield transposition.transpose, ("tf32",)
    for dtype in ELEMENTS:
        yield partial_sums.add_partials, (dtype,)


def kernels() -> Iterator[tuple[str, tiles.TiledKernel]]:
    """Every kernel by its name."""
    for make, which in makers():
        yield made(make, *which).kernel.name, make(*which)


def compiled(kernel: tiles.TiledKernel) -> str:
    """The kernel's PTX for the compute capability whose instructions it is made of."""
    # Numba asks the card for its capability when it types a device function, and uses it for nothing else.
    no_card = patch("numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=(8, 0)))
    with no_card:
        text, _ = cuda.compile(
            kernel.function,
            kernel.signature,
            device=False,
            abi="numba",
            cc=kernel.architecture,
            launch_bounds=kernel.launch_bounds,
        )
    return text


def assemble(text: str, capability: str) -> dict[str, int]:
    """Registers, bytes of stack, of spills and of static shared memory, as ptxas tells them, and remarks that it made.

    It remarks on products of warpgroups that it had to keep from running beside the threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        command = [assembler(), "-v", f"-arch={capability}", str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(told)

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, told)))

    return {
        "registers": number(r"Used (\d+) registers"),
        "stack": number(r"(\d+) bytes stack frame"),
        "spilled": number(r"(\d+) bytes spill"),
        "static_shared": number(r"(\d+) bytes smem"),
        "remarks": len(re.findall(r"\(C\d+\)", told)),
    }


def toolkit() -> str:
    """Which of the toolkits is installed: the wheels of one exclude those of another."""
    return "cuda" + importlib.metadata.version("cuda-bindings").partition(".")[0]


def versions() -> dict[str, str]:
    """What the numbers depend on besides the kernels."""
    found = {"python": "{}.{}".format(*sys.version_info)}
    for name in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def sources() -> str:
    """A digest of the fast tier's code, without comments and docstrings."""
    gemm = (fragments, gemm_tile, partial_sums, pointwise_tensor, ptx)
    modules = (*gemm, channel_vectors, depthwise_window, separable_rows, tiles, transposition, warpgroup_tile)
    digest = hashlib.sha256()
    for module in modules:
        tree = ast.parse(inspect.getsource(module))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


def table(names: list[str]) -> dict[str, dict]:
    """By kernel: the launch bounds, the instructions counted in its PTX, and what each capability's assembly takes."""
    found = {}
    for name, kernel in kernels():
        if names and name not in names:
            continue
        text = compiled(kernel)
        counts = {key: len(re.findall(pattern, text)) for key, pattern in INSTRUCTIONS.items()}
        assembled = {capability: assemble(text, capability) for capability in CAPABILITIES[kernel.architecture]}
        found[name] = {"bounds": list(kernel.launch_bounds), **counts, **assembled}
    return found


def main() -> None:
    """Rewrite the file, or print the rows of the kernels that are named."""
    names = sys.argv[1:]
    found = table(names)
    if names:
        print(json.dumps(found))
        return
    kept, digest = json.loads(TABLE.read_text()), sources()
    same = kept["sources"] == digest and kept["kernels"] == found
    tools = dict(sorted(((kept["versions"] if same else {}) | {toolkit(): versions()}).items()))
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
    head = f'"versions": {json.dumps(tools)},\n  "sources": {json.dumps(digest)}'
    TABLE.write_text(f'{{\n  {head},\n  "kernels": {{\n{rows}\n  }}\n}}\n')


if __name__ == "__main__":
    main()
