"""Scratch memory that cannot be had: an exception, in whichever thread it was wanted, nothing lost, right results then.

Each request is refused once, in a process whose `malloc` and `free` are the test's.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, itertools, sys
import llvmlite.binding as llvm
import numpy as np
import fastsepconv
from fastsepconv.kernels.cpu import scratch

real = ctypes.pythonapi.PyMem_RawMalloc
real.argtypes, real.restype = [ctypes.c_size_t], ctypes.c_void_p
held, requests, refused = set(), 0, -1

@ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_size_t)
def malloc(size):
    global requests
    requests += 1
    if requests - 1 == refused:
        return 0
    start = real(size)
    held.add(start)
    return start

@ctypes.CFUNCTYPE(None, ctypes.c_size_t)
def free(start):
    held.remove(start)

for name, function in {"malloc": malloc, "free": free}.items():
    llvm.add_symbol(f"fastsepconv_{name}", ctypes.cast(function, ctypes.c_void_p).value)
fastsepconv.set_num_threads(int(sys.argv[1]))
random = np.random.default_rng(0)
draw = lambda *shape: random.standard_normal(shape).astype("float32")
x = draw(2, 12, 12, 40)

def depthwise(multiplier):
    operands = x, draw(3, 3, 40, multiplier)
    dy = draw(2, 12, 12, 40 * multiplier)
    return (
        lambda backend: [fastsepconv.depthwise_conv2d(*operands, padding="same", backend=backend)],
        lambda backend: fastsepconv.depthwise_conv2d_grad(*operands, dy, padding="same", backend=backend),
    )

def separable(multiplier, x=x, filters=70):
    channels = x.shape[-1]
    operands = x, draw(3, 3, channels, multiplier), draw(1, 1, channels * multiplier, filters)
    dy = draw(*x.shape[:3], filters)
    return (
        lambda backend: [fastsepconv.separable_conv2d(*operands, padding="same", backend=backend)],
        lambda backend: fastsepconv.separable_conv2d_grad(*operands, dy, padding="same", backend=backend),
    )

def pointwise():
    operands, dy = (x, draw(1, 1, 40, 70)), draw(2, 12, 12, 70)
    return (
        lambda backend: [fastsepconv.pointwise_conv2d(*operands, backend=backend)],
        lambda backend: fastsepconv.pointwise_conv2d_grad(*operands, dy, backend=backend),
    )

def lost():
    return len(held) - sum(block != 0 for block in scratch._shelf)

for way in ("forward", "backward"):
    for name, calls in {
        "depthwise": depthwise(1), "depthwise x2": depthwise(2), "pointwise": pointwise(),
        "separable": separable(1), "separable x2": separable(2),
        "separable in bands": separable(1, draw(1, 160, 120, 32) / 16, 30),  # sums over many pixels
        "separable in parts": separable(1, draw(3, 30, 30, 300) / 16, 300),
    }.items():
        call = calls[way == "backward"]
        errors = 0
        for refused in itertools.count():
            scratch._shelf[:] = [0] * len(scratch._shelf)  # so that each block is asked for
            held.clear()
            requests = 0
            try:
                results = call("cpu")
            except MemoryError as error:
                errors += str(error) == scratch.NO_MEMORY
            else:
                break
            if lost():
                print(f"{name} {way}: {lost()} blocks lost when request {refused} was refused")
        for ours, wanted in zip(results, call("reference"), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
        print(f"{name} {way}: {errors == refused}, {lost()} lost, some memory wanted: {refused > 0}")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_lacking_scratch_memory_is_a_memory_error(threads):
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", SCRIPT, str(threads)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    names = ("depthwise", "depthwise x2", "pointwise", "separable", "separable x2")
    names += ("separable in bands", "separable in parts")
    wanted = [
        f"{name} {way}: True, 0 lost, some memory wanted: {(name, way) != ('depthwise', 'forward')}"
        for way in ("forward", "backward")
        for name in names
    ]
    assert process.stdout.splitlines() == wanted
    assert process.stderr == ""
