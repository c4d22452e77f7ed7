"""Environments in which a process compiles for another x86 CPU, or takes another tile, than this machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TARGETS = {
    "avx512": {
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd",
    },
    "bfloat16": {
        "NUMBA_CPU_NAME": "cooperlake",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd,+avx512bf16",
    },
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"},  # a name alone keeps AVX-512
    "portable": {"FASTSEPCONV_TILE": "portable"},
}


def environment_of(target: str) -> dict[str, str]:
    """This process's environment, but for a target's choice of tile in the place of any other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTSEPCONV_TILE", "NUMBA_CPU"))}
    return kept | TARGETS[target]


def run_again(file: str, target: str, but: str) -> None:
    """Runs a file's tests, all but the one of that name, in a process that compiles for a target."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    process = subprocess.run(
        [*command, "--deselect", f"{Path(file).relative_to(root)}::{but}"],
        cwd=root, env=environment_of(target), capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout
