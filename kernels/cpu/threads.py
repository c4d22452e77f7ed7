"""The threads that the kernels run on: which pool, how many, and what a forked child may do.

own        The package's own, see `workers`: on Linux the first choice.

Numba offers three more and takes the first that loads. They differ where it matters here, so the choice is prepared:

tbb        Thread-safe, and its idle threads sleep. pip puts its library into the environment's lib folder, where no
           loader looks, so it is loaded here by path before Numba asks for it.
omp        Thread-safe. Its idle threads would spin and slow whatever runs next, TensorFlow most of all: it is told to
           let them sleep.
workqueue  Always there. It aborts the process when two threads call at once: one that finds it busy runs alone.

A child forked after the pool was started runs on one thread: it has not inherited the others, GNU OpenMP kills a child
that calls it, and TBB hangs there now and then if another thread was using it. A child forked before gets a pool.

A choice of the user's (NUMBA_THREADING_LAYER, NUMBA_THREADING_LAYER_PRIORITY) is followed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import math
import numbers
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding
import numba
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numba.np.ufunc import parallel

from . import quota, workers
from .atomics import WORD, WORD_SIZE, external_word, keep_for_good

NUM_THREADS_VARIABLE = "FASTSEPCONV_NUM_THREADS"
OWN = "own"
CELLS_SYMBOL = "fastsepconv_pool"  # the name by which compiled code knows the cells below
COUNT, MODE, BUSY, RUN = 0, 1, 2, 3  # cell numbers; RUN holds the address of the function that does parallel work
SERIAL, SHARED, EXCLUSIVE = 0, 1, 2  # how the pool may be used: not at all, by any thread, by one thread at a time
_PRIORITY_VARIABLE = "NUMBA_THREADING_LAYER_PRIORITY"
_TBB_LIBRARY = {"linux": "libtbb.so.12", "win32": "tbb12.dll", "darwin": "libtbb.12.dylib"}

# What compiled code reads, in any thread, whatever module it lies in.
_cells = (ctypes.c_int64 * 4)(0, SERIAL, 0, 0)
keep_for_good(_cells)
_pool_was_forked = False
llvmlite.binding.add_symbol(CELLS_SYMBOL, ctypes.addressof(_cells))


def layer() -> str:
    """The pool in use, or the one that will be: "own", "tbb", "omp" or "workqueue". Starts no thread.

    Raises:
        RuntimeError: the pool that NUMBA_THREADING_LAYER asks for is not there.
    """
    if _own_pool_is_wanted():
        return OWN
    return numba.threading_layer() if parallel._is_initialized else _available_layer()


def get_num_threads() -> int:
    """How many threads a kernel is spread over. FASTSEPCONV_NUM_THREADS sets it.

    The default is the size of Numba's pool: what NUMBA_NUM_THREADS says, else the CPUs that this process may run on, of
    which no more are used than its quota of CPU time keeps busy.

    Raises:
        ValueError: FASTSEPCONV_NUM_THREADS does not hold an integer from 1 to the size of Numba's pool.
    """
    if _cells[COUNT] == 0:
        _cells[COUNT] = _default_num_threads()
    return _cells[COUNT]


def set_num_threads(n: int) -> None:
    """Spread kernels over `n` threads from now on, in the whole process.

    Raises:
        TypeError, ValueError: `n` is not an integer from 1 to the size of Numba's pool.
    """
    if isinstance(n, bool) or not isinstance(n, numbers.Integral):
        raise TypeError(_sentence("argument", "num_threads", n))
    if not 1 <= n <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(_sentence("argument", "num_threads", n))
    _cells[COUNT] = int(n)


def ensure_started() -> None:
    """Start the pool, if it is not started yet.

    Raises:
        ValueError, RuntimeError: as `get_num_threads` and `layer`.
    """
    get_num_threads()
    if _is_ready():
        return
    with global_compiler_lock:
        if not _is_ready():  # nor half ready, after an interrupt
            _cells[RUN] = _cells[RUN] or _start()
            _cells[MODE] = _mode()


def _is_ready() -> bool:
    return _cells[RUN] != 0 and (_cells[MODE] != SERIAL or _pool_was_forked)


def _start() -> int:
    """Start the pool and return the address of its function for parallel work."""
    if layer() == OWN:
        return workers.start(numba.config.NUMBA_NUM_THREADS - 1)
    parallel._launch_threads()
    return llvmlite.binding.address_of_symbol("numba_parallel_for")


@intrinsic
def current(typing_context):
    """`get_num_threads()` for compiled code; 1 before the pool is started."""

    def codegen(context, builder, signature, arguments):
        count = builder.load_atomic(external_word(builder, CELLS_SYMBOL), "monotonic", WORD_SIZE)
        return builder.select(builder.icmp_signed(">", count, WORD(1)), count, WORD(1))

    return types.int64(), codegen


def describe() -> dict[str, object]:
    """The state of the pool, as `doctor` tells it."""
    return {
        "layer": layer(),
        "asked_for": str(numba.config.THREADING_LAYER),
        "started": _cells[RUN] != 0,
        "threads": get_num_threads(),
        "forked": _pool_was_forked,
        "pool": numba.config.NUMBA_NUM_THREADS,
        "cpu_quota": quota.cpus(),
        "idle_threads_spin": layer() == "omp" and os.environ.get("OMP_WAIT_POLICY", "").lower() == "active",
    }


def _own_pool_is_wanted() -> bool:
    """Whether the user has chosen no other: in the environment, or the layer in `numba.config`."""
    chosen = numba.config.THREADING_LAYER != "default" or _PRIORITY_VARIABLE in os.environ
    return workers.available() and not chosen


def _mode() -> int:
    if _pool_was_forked:
        return SERIAL
    return EXCLUSIVE if layer() == "workqueue" else SHARED


def _default_num_threads() -> int:
    text, pool = os.environ.get(NUM_THREADS_VARIABLE, "").strip(), numba.config.NUMBA_NUM_THREADS
    if not text:
        limit = None if "NUMBA_NUM_THREADS" in os.environ else quota.cpus()
        return pool if limit is None else min(pool, math.ceil(limit))
    if not text.isdecimal() or not 1 <= int(text) <= pool:
        raise ValueError(_sentence("environment variable", NUM_THREADS_VARIABLE, text))
    return int(text)


def _sentence(kind: str, name: str, received: object) -> str:
    return (
        f"Invalid value for {kind} `{name}`. Expected an integer from 1 to {numba.config.NUMBA_NUM_THREADS}, "
        f"the size of Numba's thread pool (NUMBA_NUM_THREADS sets it). Received: {name}={received!r}"
    )


@functools.lru_cache(maxsize=1)
def _available_layer() -> str:
    for name in _candidates():
        with contextlib.suppress(ImportError):
            if name == "tbb":
                _load_tbb()
                parallel._check_tbb_version_compatible()
            with _sleeping_when_idle():
                importlib.import_module(f"numba.np.ufunc.{'workqueue' if name == 'workqueue' else name + 'pool'}")
            return name
    raise RuntimeError(
        f"Numba's threading layer '{numba.config.THREADING_LAYER}' (NUMBA_THREADING_LAYER) cannot be loaded here. "
        "Install the tbb package, or unset NUMBA_THREADING_LAYER."
    )


def _candidates() -> list[str]:
    """The pools that Numba will try, in its order."""
    openmp_survives_fork = not sys.platform.startswith("linux")
    wanted = str(numba.config.THREADING_LAYER).lower()
    return {
        "default": list(numba.config.THREADING_LAYER_PRIORITY),
        "safe": ["tbb"],
        "threadsafe": ["tbb", "omp"],
        "forksafe": ["tbb", "omp", "workqueue"] if openmp_survives_fork else ["tbb", "workqueue"],
    }.get(wanted, [wanted])


def _load_tbb() -> None:
    """Load pip's TBB, so that the loader finds it under its name when Numba asks."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError, KeyError):
        name = _TBB_LIBRARY[sys.platform]
        for file in importlib.metadata.files("tbb") or []:
            if file.name == name:
                ctypes.CDLL(str(Path(str(file.locate())).resolve()))


@contextlib.contextmanager
def _sleeping_when_idle() -> Iterator[None]:
    """While an OpenMP library loads, ask it for threads that sleep; only then does it read its environment."""
    wishes = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    ours = {} if "OMP_WAIT_POLICY" in os.environ else {k: v for k, v in wishes.items() if k not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _before_fork() -> None:
    """A child must not inherit a lock that another thread holds: wait for compilations, then for LLVM's clean-up."""
    global_compiler_lock.acquire()
    llvmlite.binding.ffi.lib._lock.__enter__()


def _after_fork() -> None:
    llvmlite.binding.ffi.lib._lock.__exit__(None, None, None)
    global_compiler_lock.release()


def _after_fork_in_child() -> None:
    global _pool_was_forked
    _after_fork()
    if _cells[RUN] != 0 or (parallel._is_initialized and layer() != OWN):
        _pool_was_forked = True
        _cells[MODE] = SERIAL


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
