"""What a machine with a card has, one call on it, and all kernels compiled for it on all cores, before the tests begin.

`make test-cuda` starts with `python -m tests.kernels.cuda.warm_up`: what is missing shows within seconds, and the tests
find every kernel on the disk. Exit codes: 0; 1 where a kernel does not compile; 4 where nothing can be tested here.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import numpy as np

from fastsepconv.kernels import nvidia

OK, NOT_COMPILED, MISSING = 0, 1, 4
PACKAGES = (
    "numpy", "numba", "llvmlite", "numba-cuda", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink", "torch", "keras",
    "ml_dtypes", "pytest", "pytest-xdist",
)  # fmt: skip


def main() -> int:
    """Tell, try, compile; returns the exit code."""
    say(described())
    missing = nvidia.obstacle()
    if missing:
        say(f"The CUDA kernels cannot be tested here: {missing}.")
        return MISSING
    try:
        error = first_call()
    except Exception as failure:
        say(f"The first call on the card failed: {type(failure).__name__}: {failure}")
        return MISSING
    say(f"The first call on the card is off by {error:.1e} of the largest value.")
    say(f"A launch takes the host {host_microseconds():.1f} us.")
    capability = _capability()
    return compile_all(range(len(kernels(capability))), capability, os.cpu_count() or 1)


def described() -> str:
    """The card, the driver, and the versions of what is installed."""
    driver, cards = nvidia.look()
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    found = ", ".join(map(str, cards)) or "no card"
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "not set"
    return f"{found}, driver {driver}, CUDA_HOME {toolkit}; {', '.join(versions)}"


def first_call() -> float:
    """How far a small product by the plain kernels is off, as a share of the largest value."""
    import fastsepconv

    x, kernel = np.random.default_rng(0).standard_normal((2, 3, 3, 9)), np.eye(9, 5) + 0.5
    y = fastsepconv.pointwise_conv2d(x, kernel, backend="cuda")
    true = fastsepconv.pointwise_conv2d(x, kernel, backend="reference")
    error = float(np.abs(y - true).max() / np.abs(true).max())
    if not error < 1e-12:
        raise ArithmeticError(f"a product is off by {error} of its largest value")
    return error


def host_microseconds(rounds: int = 20, launches: int = 50) -> float:
    """The host's time for a launch of a small kernel of many arguments, the driver's share included: the best round's.

    What else the computer does makes a round slower and none faster. A round is so short that what waits on the card
    never fills the stream, which would make the host wait too.
    """
    from fastsepconv.kernels.cuda import depthwise, driver
    from fastsepconv.kernels.geometry import resolve

    on, kernel = driver.first_device(), depthwise.forward_kernel("float32", "float32", "float32")
    g, times = resolve((1, 4, 4, 4), (3, 3, 4, 1), (1, 1), "same", (1, 1)), []
    with driver.turned_to(on):
        stream = driver.own_stream(on)
        memory = driver.allocate(4096, "a test", stream)
        arguments = g, memory, 0, memory, 0, 0, memory, 0.0, 1.0
        try:
            kernel.over(64, stream, *arguments)  # compiled and loaded
            for _ in range(rounds):
                driver.synchronize(stream, "Launching")
                began = time.perf_counter()
                for _ in range(launches):
                    kernel.over(64, stream, *arguments)
                times.append((time.perf_counter() - began) / launches)
        finally:
            driver.free(memory, stream)
        driver.synchronize(stream, "Launching")
    return 1e6 * min(times)


def compile_all(places: Sequence[int], capability: tuple[int, int], processes: int) -> int:
    """Compile those of the kernels that are not on the disk yet; returns the exit code."""
    began, count = time.monotonic(), len(places)
    work = [(place, capability) for place in places]
    with ProcessPoolExecutor(min(processes, count), multiprocessing.get_context("spawn")) as pool:
        failures = [failure for failure in pool.map(compiled, work) if failure]
    for failure in failures:
        say(failure)
    say(f"{count - len(failures)} of {count} kernels are compiled, after {time.monotonic() - began:.0f} s.")
    return NOT_COMPILED if failures else OK


def compiled(work: tuple[int, tuple[int, int]]) -> str | None:
    """Compile the kernel of that place in the list; what went wrong, if anything did."""
    from fastsepconv.kernels.cuda import binaries

    place, capability = work
    kernel = kernels(capability)[place]
    try:
        binaries.get(kernel, capability)
    except Exception as failure:
        return f"{kernel.name} does not compile: {type(failure).__name__}: {failure}"
    return None


@cache
def kernels(capability: tuple[int, int]) -> list:
    """Every kernel of both tiers that cards of this capability run, those that take longest first."""
    from fastsepconv.kernels.cuda.fast_kernels import made

    from .assembly import kernels as plain
    from .fast_assembly import makers

    return [*(made(make, *which).kernel for make, which in makers(capability)), *plain()]


def _capability() -> tuple[int, int]:
    from fastsepconv.kernels.cuda import driver

    return driver.first_device().capability


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
