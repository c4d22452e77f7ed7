"""What every plain kernel assembles to: registers, shared memory and spills for each capability, in assembly.json.

`python -m tests.kernels.cuda.assembly` compiles and assembles all of them and rewrites the file. It needs numba-cuda
and NVIDIA's assembler (the dependency group `test` brings both), and no card.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastsepconv.kernels.cuda import activations, binaries, depthwise, pointwise, sums
from fastsepconv.kernels.cuda.elements import ELEMENTS, sums_of
from fastsepconv.kernels.cuda.launch import Kernel

TABLE = Path(__file__).with_name("assembly.json")
CAPABILITIES = ((8, 0), (9, 0))
HALVES = ("float16", "bfloat16")


def kernels() -> Iterator[Kernel]:
    """Every plain kernel on every element, and on the mixtures where a separable convolution keeps its middle wide."""
    for one in ELEMENTS:
        yield from _on(one, one, one)
        yield sums.row_sums_kernel(one)
        yield sums.part_sums_kernel(sums_of(one), one)
        yield activations.activation_kernel(sums_of(one), one)
    for half in HALVES:
        yield from _on(half, half, "float32")
        yield from _on("float32", half, half)
        for module in (depthwise, pointwise):
            yield module.forward_kernel("float32", half, "float32")
            yield module.d_x_kernel(half, "float32", half)
            yield module.d_kernel_kernel(half, "float32")


def _on(x: str, kernel: str, y: str) -> Iterator[Kernel]:
    for module in (depthwise, pointwise):
        yield module.forward_kernel(x, kernel, y)
        if kernel == x:
            yield module.d_x_kernel(kernel, x, y)
        if kernel == y:
            yield module.d_kernel_kernel(x, y)


def assembler() -> str | None:
    """NVIDIA's ptxas, from its wheel or the system."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]
    found = itertools.chain.from_iterable(place.glob("*/bin/ptxas*") for place in places)
    return next(map(str, sorted(found, reverse=True)), None) or shutil.which("ptxas")


def measure(kernel: Kernel, capability: tuple[int, int]) -> dict[str, int]:
    """Registers, shared and spilled bytes of a kernel, and its double-precision instructions."""
    text = binaries.ptx(kernel, capability)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        command = [str(assembler()), "-v", "-arch=sm_{}{}".format(*capability), str(source), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kernel.name}: {done.stderr}")
    told = done.stdout + done.stderr

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, told)))

    return {
        "registers": number(r"Used (\d+) registers"),
        "shared": number(r"(\d+) bytes smem"),
        "spilled": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "double": len(re.findall(r"^\s*(?:fma|mul|add|sub|cvt)\.\S*f64", text, re.MULTILINE)),
    }


def table() -> dict[str, dict[str, dict[str, int]]]:
    """By kernel and capability, what `measure` finds."""
    return {
        kernel.name: {"sm_{}{}".format(*capability): measure(kernel, capability) for capability in CAPABILITIES}
        for kernel in kernels()
    }


def main() -> None:
    """Rewrite the table."""
    rows = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(table().items())]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{TABLE}: {len(rows)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
