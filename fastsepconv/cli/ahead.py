"""Kernels of the CPU compiled ahead of their first use: `compiled_meanwhile` lets another process fill the disk cache.

Compiling keeps one core busy, and so does much else before a first step: imports, building a network, tracing it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

import fastsepconv


@contextlib.contextmanager
def compiled_meanwhile(dtype: str) -> Iterator[None]:
    """While the context lasts, another process compiles what a separable convolution of `dtype` needs.

    Where it fails, or is not yet done when the context ends, this process compiles the rest as it would have.
    """
    command = [sys.executable, "-m", __name__, dtype]
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def compile_separable(dtype: str) -> None:
    """Compile the separable convolution of `dtype`, forward and backward, by computing a small one."""
    shapes = (1, 4, 4, 2), (3, 3, 2, 1), (1, 1, 2, 2), (1, 4, 4, 2)
    x, depthwise_kernel, pointwise_kernel, dy = (np.zeros(shape, dtype) for shape in shapes)
    fastsepconv.separable_conv2d(x, depthwise_kernel, pointwise_kernel, padding="same", backend="cpu")
    fastsepconv.separable_conv2d_grad(x, depthwise_kernel, pointwise_kernel, dy, padding="same", backend="cpu")


if __name__ == "__main__":
    compile_separable(sys.argv[1])
