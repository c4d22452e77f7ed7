"""What the compiler makes of the micro-kernels' inner loops: a JSON list for each function named, for Numba's target.

    python -m tests.kernels.inner_loops float32 gemm._multiply_panel depthwise_line._slide

The machine code itself is never run, so any target will do. It is not what `inspect_asm` returns: that generates code
once more, from a module which the first time has changed already, and the registers come out otherwise.
"""

from __future__ import annotations

import importlib
import json
import re
import sys

import llvmlite.binding as llvm
from numba.core import types
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary

from fastsepconv.kernels.cpu import pool


def assembly(name: str, scalar: types.Float) -> str:
    """The assembly of `module.function`, a function made by `compiled_once`."""
    module, function = name.split(".")
    compiled = pool._called_by_address[getattr(importlib.import_module(f"fastsepconv.kernels.cpu.{module}"), function)]
    _, callback, _, _ = pool._functions[pool._name(compiled, scalar).encode()]
    callback._cache = NullCache()  # what comes from the disk has no text
    texts, finalize = {}, JITCodeLibrary._finalize_specific

    def record(library):
        texts[library] = str(library._final_module)
        finalize(library)

    JITCodeLibrary._finalize_specific = record
    try:
        assert callback.address
    finally:
        JITCodeLibrary._finalize_specific = finalize
    library = callback._library
    return library.codegen._tm.emit_assembly(llvm.parse_assembly(texts[library]))


def inner_loops(text: str) -> list[dict]:
    """The loops without another in them that hold fused multiply-adds, of numbers or of pairs of bfloat16."""
    lines, labels, loops = text.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.\w+):", line):
            labels[label[1]] = number
        jump = re.match(r"\tj\w+\t(\.\w+)", line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], number))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    described = [_describe(lines[first : last + 1]) for first, last in innermost]
    return [loop for loop in described if loop["fused"]]


def _describe(lines: list[str]) -> dict:
    instructions = [line for line in lines if re.match(r"\t[a-z]", line)]
    fused = [line for line in instructions if re.match(r"\t(vfn?madd\d+p|vdpbf16ps)", line)]
    return {
        "instructions": len(instructions),
        "fused": len(fused),
        "registers": sorted({kind for line in fused for kind in re.findall(r"%([xyz]mm)", line)}),
        "spills": sum(bool(re.search(r"\(%rsp\).*%[xyz]mm|%[xyz]mm.*\(%rsp\)", line)) for line in instructions),
        "masked": any("vmaskmov" in line or "{%k" in line for line in instructions),
    }


if __name__ == "__main__":
    scalar = {"float32": types.float32, "bfloat16": types.uint16}[sys.argv[1]]
    print(json.dumps({name: inner_loops(assembly(name, scalar)) for name in sys.argv[2:]}))
