"""What was measured on: the processor, its caches and features, the system; its arithmetic peak and rate of copying."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from .problems import FLOAT32

FEATURES = ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")


def describe() -> dict:
    """The machine as a JSON object; what this system does not tell is left out."""
    facts = {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "features": [name for name in FEATURES if name in _cpuinfo("flags", "Features").split()],
        "caches": _caches(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def available_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_seconds() -> float:
    """Processor time that all processes together have used; 0 where the system does not tell."""
    fields = _read("/proc/stat").split("\n")[0].split()[1:9]
    if not fields:
        return 0.0
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = map(int, fields)
    return (user + nice + system + interrupts + soft_interrupts + stolen) / _ticks()


def process_seconds(pid: int) -> float:
    """Processor time that one process has used; 0 where the system does not tell."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _ticks() if fields else 0.0


def peak(threads: int, dtype: str = FLOAT32) -> dict[str, float]:
    """GFLOP/s of a dtype's multiply-adds, by the number of threads; measured now, in a process of its own."""
    return _measured("peak.py", threads, dtype)["gflops"]


def copying(threads: int) -> dict[str, float]:
    """GB/s that are read and written in a copy which no cache holds, likewise."""
    return _measured("bandwidth.py", threads)["gbytes"]


def higher(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of the peak, or of copying, for each number of threads."""
    return {threads: max(first[threads], second[threads]) for threads in first}


def _measured(program: str, threads: int, *arguments: str) -> dict:
    """What a program of this folder prints."""
    command = [sys.executable, str(Path(__file__).with_name(program)), str(threads), *arguments]
    environment = os.environ | {"NUMBA_NUM_THREADS": str(threads)}
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=tempfile.gettempdir()
    )
    return json.loads(answer.stdout)


def _ticks() -> int:
    return os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    """A virtual machine may hide the model's number: the family and model that it cannot hide are added."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family else name


def _cpuinfo(*keys: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _caches() -> dict[str, str]:
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(folder / "type")
        if kind != "Instruction":
            caches[f"L{_read(folder / 'level')}"] = _read(folder / "size")
    return caches


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
