"""Scratch memory that cannot be had: an exception, in whichever thread it was wanted, and right results afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
import llvmlite.binding as llvm
import numpy as np
import fastsepconv
from fastsepconv.kernels.cpu import scratch

real = ctypes.pythonapi.PyMem_RawMalloc
real.argtypes, real.restype = [ctypes.c_size_t], ctypes.c_void_p
left = 0  # bytes a request may ask for

@ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_size_t)
def malloc(size):
    return (real(size) or 0) if size <= left else 0

llvm.add_symbol("fastsepconv_malloc", ctypes.cast(malloc, ctypes.c_void_p).value)
fastsepconv.set_num_threads(int(sys.argv[1]))
random = np.random.default_rng(0)
x, depthwise, pointwise, dy = (
    random.standard_normal(shape).astype("float32")
    for shape in ((2, 12, 12, 40), (3, 3, 40, 1), (1, 1, 40, 70), (2, 12, 12, 70))
)
calls = {
    "separable": lambda backend: [
        fastsepconv.separable_conv2d(x, depthwise, pointwise, padding="same", backend=backend)
    ],
    "pointwise": lambda backend: [fastsepconv.pointwise_conv2d(x, pointwise, backend=backend)],
    "separable_grad": lambda backend: fastsepconv.separable_conv2d_grad(
        x, depthwise, pointwise, dy, padding="same", backend=backend
    ),
}
for name, call in calls.items():
    for left in (0, 4096):  # 0: nothing at all; 4096: what the caller wants, but not what the shares do
        try:
            call("cpu")
        except MemoryError as error:
            print(name, left, error)
left = sys.maxsize
for name, call in calls.items():
    for ours, wanted in zip(call("cpu"), call("reference"), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_lacking_scratch_memory_is_a_memory_error(threads):
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", SCRIPT, str(threads)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    reason = "no memory for a kernel's scratch space"
    wanted = [f"{name} {left} {reason}" for name in ("separable", "pointwise", "separable_grad") for left in (0, 4096)]
    assert process.stdout.splitlines() == wanted
    assert process.stderr == ""
