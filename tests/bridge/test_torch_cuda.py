"""PyTorch tensors on a card, without one: the way to the kernels in the simulator, and to a double of the driver."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from ..kernels.cuda.conftest import double, toolkit
from ..kernels.cuda.driver_double import values_at
from .torch_cases import KINDS, operands, torch

__all__ = ["double", "toolkit"]

ROOT = Path(__file__).parents[2]
STREAM = 4242


@pytest.mark.parametrize(
    "file", ["tests/bridge/check_torch_on_card.py", "tests/kernels/cuda/simulated/check_card_tests.py"]
)
def test_in_the_simulator(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEPCONV_")}
    settings |= {"NUMBA_ENABLE_CUDASIM": "1", "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "torch"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 50 and "skipped" not in done.stdout, done.stdout


@pytest.fixture
def on_double(double, monkeypatch):
    """Tensors on the CPU pass for some on the double's card, whose kernels do nothing."""
    from fastsepconv import dispatch
    from fastsepconv.bridge import torch_cuda, torch_kernels
    from fastsepconv.kernels import cuda

    monkeypatch.setattr(dispatch, "obstacle", lambda name: None)
    monkeypatch.setattr(dispatch, "kernels_on_card", lambda: cuda)
    seam = torch_kernels._kernels_on(torch.device("cuda", 0))
    monkeypatch.setattr(torch_kernels, "_kernels_on", lambda device: seam)
    monkeypatch.setattr(torch_cuda, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch_cuda, "current_stream", lambda device: STREAM)
    return double


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_launched_on_pytorchs_stream_and_nothing_waits(rng, on_double, kind):
    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 3), 1, 6, torch.bfloat16)
    KINDS[kind](*inputs).sum().backward()
    assert on_double.launches and {launch["stream"] for launch in on_double.launches} == {STREAM}
    assert not on_double.named("cuStreamSynchronize", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")
    # What the kernels need for themselves is PyTorch's too.
    assert not on_double.named("cuMemAllocAsync", "cuMemFreeAsync")


@pytest.fixture
def given(monkeypatch):
    """References to what PyTorch gave the kernels for themselves, which let it go, and their addresses."""
    from fastsepconv.bridge import torch_cuda

    found, new_bytes = [], torch_cuda.new_bytes

    def note(size, device):
        tensor = new_bytes(size, device)
        found.append((weakref.ref(tensor), tensor.data_ptr(), size))
        return tensor

    monkeypatch.setattr(torch_cuda, "new_bytes", note)
    return found


def test_memory_between_the_steps_is_pytorchs_and_held_until_all_is_launched(rng, on_double, given, monkeypatch):
    launch, alive = on_double.cuLaunchKernel, []

    def note(*arguments):
        alive.append([tensor() is not None for tensor, *_ in given])
        return launch(*arguments)

    monkeypatch.setattr(on_double, "cuLaunchKernel", note)
    KINDS["separable"](*(t.detach() for t in operands(rng, "separable", (2, 6, 7, 5), (3, 3), 1, 6, torch.float64)))
    ((tensor, address, size),) = given
    assert size == 2 * 4 * 5 * 5 * 8 and tensor() is None
    assert alive == [[True], [True]]
    values = values_at(on_double.parameters, "qqqqQQQiQdd")  # the product's, which reads what lies between
    assert values[4] == address


def test_memory_is_given_back_when_a_launch_fails(rng, on_double, given):
    on_double.fails["cuLaunchKernel"] = on_double.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="Launching"):
        KINDS["separable"](*operands(rng, "separable", (2, 6, 7, 5), (3, 3), 1, 6, torch.float32))
    assert given and all(tensor() is None for tensor, *_ in given)
    from fastsepconv.kernels.cuda import memory

    assert memory._lent.room is None


def test_a_launch_is_given_the_tensors_addresses(rng, on_double):
    x, kernel, bias = (t.detach() for t in operands(rng, "pointwise", (2, 6, 7, 5), (3, 3), 1, 6, torch.float32))
    y = KINDS["pointwise"](x, kernel, bias)
    values = values_at(on_double.parameters, "qqqqQQQiQff")
    assert values[:3] == [84, 5, 6]
    assert values[4:9] == [x.data_ptr(), kernel.data_ptr(), bias.data_ptr(), 1, y.data_ptr()]


def test_what_the_driver_refuses_is_told(rng, on_double):
    from cuda.bindings import driver as real

    on_double.fails["cuLaunchKernel"] = real.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"Launching depthwise_forward.* failed: CUDA_ERROR_INVALID_VALUE"):
        KINDS["depthwise"](*operands(rng, "depthwise", (1, 6, 7, 5), (3, 3), 1, 6, torch.float32))
