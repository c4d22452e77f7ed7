"""`fastsepconv doctor`: one screen that says what runs here and how, and what to do about what is not well."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fastsepconv.cli import console

EXAMPLES = ("fastsepconv doctor", "fastsepconv doctor --json | python -m json.tool")
WELL, NOTE, ILL = "ok", "note", "ill"
_COLOURS = {WELL: "32", NOTE: "33", ILL: "31"}
_FEATURES = (
    "avx512f", "avx512bf16", "avx512fp16", "amx-bf16", "avx2", "fma", "avx", "sse4.2", "sve2", "sve", "neon", "bf16",
)  # fmt: skip


class Finding(NamedTuple):
    """What was found in one place: a state, a sentence, what to do, and the figures behind it."""

    state: str
    text: str
    advice: str = ""
    details: dict[str, Any] | None = None


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the command line."""
    console.add_command(
        subparsers,
        "doctor",
        "say what runs here, and what to do about what is not well",
        "Looks at the processor, the threads, the compiled kernels, the frameworks and CUDA, and runs one kernel.\n"
        "ok: well. note: well, but it could be better. ill: the line says what to do.",
        EXAMPLES,
        exits={console.OK: "all is well", console.CHECK_FAILED: "something is not well"},
    )


def run(args: argparse.Namespace) -> int:
    """Look everywhere and print what was found; 1 if something is not well."""
    findings = _without_repetition({name: _looked_at(look) for name, look in CHECKS.items()})
    well = all(finding.state != ILL for finding in findings.values())
    if args.json:
        found = {name: finding._asdict() for name, finding in findings.items()}
        print(json.dumps({"well": well, "versions": _versions(), "checks": found}, indent=2))
    else:
        _print_screen(findings)
    return console.OK if well else console.CHECK_FAILED


def _looked_at(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # the doctor tells of whatever is broken, and goes on
        return Finding(ILL, f"{type(error).__name__}: {error}", "mend what the message names, then run doctor again")


def _without_repetition(findings: dict[str, Finding]) -> dict[str, Finding]:
    """The findings, each error told once: one wrong setting may stop several checks."""
    first: dict[str, str] = {}
    told = {}
    for name, finding in findings.items():
        origin = first.setdefault(finding.text, name)
        told[name] = finding if origin == name else Finding(finding.state, f"the same as {origin}")
    return told


def _processor() -> Finding:
    from fastsepconv.kernels.cpu import tiles

    name, features = tiles.target()
    has = [feature for feature in _FEATURES if f"+{feature}" in features.split(",")]
    details = {"cpu": name, "features": has, "tile": tiles.CHOSEN.name, "numba_cpu": name}
    known = ", ".join(has) or ("no vector extension known here" if features else f"what every {name} has")
    text = f"{tiles.explain()}. It has {known}"
    if tiles.keeps_host_features():
        advice = f"set NUMBA_CPU_FEATURES as well, to nothing for those that every {name} has"
        text += ": this machine's features, which NUMBA_CPU_NAME alone leaves as they are"
        return Finding(NOTE, text, advice, details)
    if tiles.CHOSEN.name == "portable" and not os.environ.get("FASTSEPCONV_TILE"):
        return Finding(NOTE, text, "kernels are slow here: Numba sees neither AVX2 nor NEON on this processor", details)
    return Finding(WELL, text, details=details)


def _threads() -> Finding:
    from fastsepconv.kernels.cpu import threads

    threads.ensure_started()
    found = threads.describe()
    name = "the package's own pool" if found["layer"] == threads.OWN else found["layer"]
    text = f"{name}, {found['threads']} of its {found['pool']} threads"
    if found["cpu_quota"] is not None:
        text += f"; a quota of CPU time leaves it {found['cpu_quota']:g} CPUs"
    if found["layer"] == "workqueue":
        better = "pip install tbb" if _pip_has_tbb() else "install an OpenMP library (libgomp1 on Debian and Ubuntu)"
        return Finding(NOTE, f"{text}, by one call at a time; others run on one thread", better, found)
    if found["idle_threads_spin"]:
        return Finding(NOTE, f"{text}, whose idle threads spin and slow TensorFlow", "unset OMP_WAIT_POLICY", found)
    return Finding(WELL, text, details=found)


def _cache() -> Finding:
    from fastsepconv.kernels.cpu import jit

    found = jit.state()
    if found["problem"]:
        return Finding(ILL, f"{found['folder'] or 'no folder'}: {found['problem']}", "", found)
    size = f"{found['entries']} compiled kernels, {found['bytes'] / 2**20:.1f} MiB"
    return Finding(WELL, f"{found['folder']}: {size}", details=found)


def _kernel() -> Finding:
    import numpy as np

    from fastsepconv.kernels import cpu, reference
    from fastsepconv.kernels.cpu import jit
    from fastsepconv.kernels.geometry import resolve

    rng = np.random.default_rng(0)
    x, depthwise, pointwise = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 7, 9, 21), (3, 3, 21, 2), (42, 19))
    )
    g = resolve(x.shape, depthwise.shape, (1, 1), "same", (1, 1))
    y = np.full((*g.output_shape[:3], 19), np.nan, np.float32)
    compiled_before, start = jit.state()["compiled"], time.perf_counter()
    cpu.separable_forward(g, x, depthwise, pointwise, None, y)
    seconds, compiled = time.perf_counter() - start, jit.state()["compiled"] - compiled_before
    expected = reference.separable_forward(g, x, depthwise, pointwise)
    error = float(np.abs(y - expected).max() / np.abs(expected).max())
    how = f"compiled in {seconds:.1f} s" if compiled else f"loaded in {seconds:.2f} s"
    details = {"relative_error": error, "first_call_s": seconds, "compiled": compiled}
    text = f"a separable convolution, {how}, is within {error:.0e} of the float64 reference"
    if not error <= 1e-5:
        advice = "results cannot be trusted: try FASTSEPCONV_TILE=portable, and report this screen"
        return Finding(ILL, text.replace("is within", "is off by").replace(" of the", " against the"), advice, details)
    return Finding(WELL, text, details=details)


def _backend() -> Finding:
    from fastsepconv import dispatch

    pick = dispatch.explain()
    details = {"backend": pick.name, "reason": pick.reason, "passed_over": pick.obstacles}
    text = f"{pick.name}, since {pick.reason}"
    if pick.name == "reference":
        return Finding(NOTE, text, f"this backend is slow; unset {dispatch.ENVIRONMENT}", details)
    return Finding(WELL, text, details=details)


def _tensorflow() -> Finding:
    if importlib.util.find_spec("tensorflow") is None:
        return Finding(NOTE, "not installed; the array API needs none", "pip install 'fastsepconv[tensorflow]'")
    if console.keras_backend() != "tensorflow":
        text = f"Keras runs on {console.keras_backend()}, as KERAS_BACKEND says"
        return Finding(NOTE, text, "unset KERAS_BACKEND to use the layers with TensorFlow")
    try:
        console.load_keras()
    except console.CommandError as error:
        return Finding(NOTE, str(error), "pip install 'fastsepconv[tensorflow]'")
    from fastsepconv.bridge import tensorflow as bridge

    found = bridge.status()
    text = f"TensorFlow {found['tensorflow']} and Keras {_version('keras')} reach the kernels by {found['path']}"
    if found["path"] == "c-api" or found["backend"] != "cpu":
        return Finding(WELL, f"{text}: {found['reason']}", details=found)
    if os.environ.get(bridge.MODE_VARIABLE) == found["path"]:
        return Finding(NOTE, f"{text}: {found['reason']}", f"it is slower; unset {bridge.MODE_VARIABLE}", found)
    return Finding(ILL, f"{text}: {found['reason']}", "it is slower; another TensorFlow may offer the C API", found)


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(WELL, "not installed; the layers work on TensorFlow as well")
    from fastsepconv.bridge import torch as bridge

    found = bridge.status()
    return Finding(WELL, f"PyTorch {found['torch']} reaches the kernels by {found['path']}", details=found)


def _cuda() -> Finding:
    from fastsepconv.kernels import nvidia

    driver, cards = nvidia.look()
    numba_cuda, obstacle = _version("numba-cuda"), nvidia.obstacle()
    details = {"driver": driver, "cards": [card.name for card in cards], "numba_cuda": numba_cuda, "obstacle": obstacle}
    if obstacle is None:
        from fastsepconv.kernels.cuda import tiers

        details["tiers"] = tiers.explain()
        where = "Numba's simulator" if nvidia.is_simulated() else ", ".join(map(str, cards))
        return Finding(WELL, f"{where}, driver {driver}, numba-cuda {numba_cuda}; {tiers.explain()}", details=details)
    text = f"cannot run here: {obstacle}"
    if cards and not numba_cuda:
        return Finding(NOTE, text, "pip install 'fastsepconv[cuda13]' to use the card", details)
    return Finding(WELL, text, details=details)


CHECKS: dict[str, Callable[[], Finding]] = {
    "processor": _processor,
    "threads": _threads,
    "cache": _cache,
    "kernels": _kernel,
    "backend": _backend,
    "tensorflow": _tensorflow,
    "torch": _torch,
    "cuda": _cuda,
}


def _pip_has_tbb() -> bool:
    return (sys.platform, platform.machine()) in {("linux", "x86_64"), ("win32", "AMD64")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    packages = ("fastsepconv", "numpy", "numba", "llvmlite", "tensorflow", "torch", "keras")
    machine = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "machine": machine, **{name: _version(name) for name in packages}}


def _print_screen(findings: dict[str, Finding]) -> None:
    versions = _versions()
    width = min(shutil.get_terminal_size((console.WIDTH_WITHOUT_TERMINAL, 24)).columns, 120)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(
        f"fastsepconv {versions['fastsepconv']}, Python {versions['python']}, NumPy {versions['numpy']}, "
        f"Numba {versions['numba']}, {versions['machine']}\n"
    )
    for name, finding in findings.items():
        state = f"{finding.state:<5}"
        advice = f" -> {finding.advice}" if finding.advice else ""
        lines = textwrap.wrap(f"{name:<12}{finding.text}.{advice}", width - 6, subsequent_indent=" " * 12)
        print((f"\033[{_COLOURS[finding.state]}m{state}\033[0m" if coloured else state), "\n      ".join(lines))
    ill = [name for name, finding in findings.items() if finding.state == ILL]
    print(f"\nNot well: {', '.join(ill)}." if ill else "\nAll is well.")
