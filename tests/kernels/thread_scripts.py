"""Scripts about the thread pool, which is settled once a process: each runs in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap

from fastsepconv.kernels.cpu import workers

HAS_TBB = importlib.util.find_spec("numba.np.ufunc.tbbpool") is not None and sys.platform == "linux"
NOISE = "Unable to join threads to shut down before fork()"  # Numba's TBB layer says it on stdout
NUMBA_LAYERS = ["tbb", "omp", "workqueue"]
LAYERS = [*(["own"] if workers.available() else []), *NUMBA_LAYERS]
KERNEL = """
    import numba, numpy as np, os, sys, threading
    from numba import types
    from fastsepconv.kernels.cpu import jit, threads
    from fastsepconv.kernels.cpu.memory import view
    from fastsepconv.kernels.cpu.pool import parallel_kernel

    @parallel_kernel
    def _double(dtype, worker, workers, length, x, y):
        source, target = view(dtype, x, length), view(dtype, y, length)
        for i in range(worker, length, workers):
            target[i] = 2 * source[i]

    @jit.kernel
    def double(dtype, workers, length, x, y):
        _double(dtype, workers, length, x, y)

    def right(length=4096):
        x = np.arange(float(length))
        y = np.full(length, np.nan)
        double(np.float64, threads.get_num_threads(), length, x.ctypes.data, y.ctypes.data)
        return np.array_equal(y, 2 * x)
"""
FORK = """
    import signal

    def outcome_of_child(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that hangs dies of it
            code = 3
            try:
                code = work()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def on(layer: str) -> dict[str, str]:
    """The environment in which that pool is taken: the package's own unless the user wants another."""
    return {} if layer == "own" else {"NUMBA_THREADING_LAYER": layer}


def run(code: str, tmp_path, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` after the kernel `double`, as a file in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text("".join(textwrap.dedent(part) for part in (KERNEL, FORK, code)))
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "OMP_", "GOMP_", "KMP_", "FASTSEPCONV_"))
    }
    settings = {
        **kept,
        "OPENBLAS_NUM_THREADS": "1",
        "FASTSEPCONV_CACHE_DIR": str(tmp_path / "cache"),
        "NUMBA_NUM_THREADS": "4",
        **environment,
    }
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)


def output(code: str, tmp_path, **environment: str) -> str:
    """What `code` prints; it must end well and warn of nothing."""
    result = run(code, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return "\n".join(line for line in result.stdout.splitlines() if line and not line.startswith(NOISE))
