"""What only a card can show: `make test-cuda`. Skipped, with its reason, everywhere else.

The simulator's checks run on it too, and compute-sanitizer looks over the small cases where it is on the PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import fastsepconv
from tests.tolerances import RELATIVE, assert_close, relative_error

pytestmark = pytest.mark.cuda
WAY_TO_A_CARD = "array API"
ROOT = Path(__file__).parents[3]
CHECKS = "tests/kernels/cuda/simulated"
RESULTS = "tests/kernels/cuda/test_on_card_results.py"
SANITIZER = "compute-sanitizer"
GROUPS = {
    "the kernels": [f"{CHECKS}/check_kernels.py", "-k", "not simulator"],
    "the array API beside Keras": ["tests/test_ops.py", "tests/test_ops_arrays.py", "-k", "cuda"],
    "Keras's layers on TensorFlow": [f"{CHECKS}/check_tensorflow.py"],
}


def run(*command: str, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=without_worker() | settings, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.takes_long
@pytest.mark.parametrize("group", GROUPS)
def test_what_the_simulator_computes_a_card_computes_too(group):
    if group != "the kernels" and not find_spec("tensorflow"):
        pytest.skip("TensorFlow is not installed")
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *GROUPS[group],
        FASTSEPCONV_DEBUG="1",
        FASTSEPCONV_CUDA_TIER="plain",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 5


@pytest.fixture
def arrays(rng):
    return [rng.standard_normal(shape, np.float32) for shape in ((2, 19, 17, 96), (3, 3, 96, 1), (96, 64))]


def test_torch_tensors_are_computed_where_they_are(arrays):
    torch = pytest.importorskip("torch")
    on_card = [torch.from_numpy(array).cuda() for array in arrays]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = fastsepconv.separable_conv2d(*on_card, padding="same")
        gradients = fastsepconv.separable_conv2d_grad(*on_card, y, padding="same")
    stream.synchronize()
    true = fastsepconv.separable_conv2d(*arrays, padding="same", backend="reference")
    assert y.is_cuda and all(gradient.is_cuda for gradient in gradients)
    assert_close("y", y.cpu().numpy(), true)
    expected = fastsepconv.separable_conv2d_grad(*arrays, y.cpu().numpy(), padding="same", backend="reference")
    for name, gradient, exact in zip(("dx", "d_depthwise", "d_pointwise", "d_bias"), gradients, expected, strict=True):
        assert_close(name, gradient.cpu().numpy(), exact)


def test_a_call_can_be_captured_into_a_graph_and_replayed(arrays):
    torch = pytest.importorskip("torch")
    x, *kernels = [torch.from_numpy(array).cuda() for array in arrays]
    first = fastsepconv.separable_conv2d(x, *kernels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastsepconv.separable_conv2d(x, *kernels)
    graph.replay()
    torch.testing.assert_close(y, first, rtol=0, atol=0)
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 2 * first)


def test_numba_arrays_are_computed_where_they_are(arrays):
    from numba import cuda

    on_card = [cuda.to_device(array) for array in arrays]
    y = fastsepconv.separable_conv2d(*on_card, padding="same")
    assert type(y) is type(on_card[0])
    true = fastsepconv.separable_conv2d(*arrays, padding="same", backend="reference")
    assert_close("y", y.copy_to_host(), true)


def test_a_pointer_to_the_computers_memory_is_refused_and_the_card_goes_on(arrays):
    from tests.card_arrays import InterfaceArray

    with pytest.raises(ValueError, match=r"argument `x`\. Expected an array in the memory of a card"):
        fastsepconv.separable_conv2d(*map(InterfaceArray, arrays))
    y = fastsepconv.separable_conv2d(*arrays, backend="cuda")
    assert_close("y", y, fastsepconv.separable_conv2d(*arrays, backend="reference"))


def test_out_of_memory_is_told_and_the_card_goes_on(arrays):
    """Twice what the card has: sizes that no address can count would be another error."""
    from fastsepconv.kernels.cuda import driver

    torch = pytest.importorskip("torch")
    everything, on = torch.cuda.get_device_properties(0).total_memory, driver.device(0)
    with driver.turned_to(on), pytest.raises(RuntimeError, match=r"has no room for the \d+ bytes of a test"):
        driver.allocate(2 * everything, "a test", driver.own_stream(on))
    y = fastsepconv.separable_conv2d(*arrays, backend="cuda")
    assert_close("y", y, fastsepconv.separable_conv2d(*arrays, backend="reference"))


def test_the_current_card_is_the_callers_before_and_after(arrays):
    torch = pytest.importorskip("torch")
    last = torch.cuda.device_count() - 1
    on_last = [torch.from_numpy(array).cuda(last) for array in arrays]
    with torch.cuda.device(0):
        for _ in range(2):
            y = fastsepconv.separable_conv2d(*on_last)
            fastsepconv.separable_conv2d(*arrays, backend="cuda")
            assert torch.cuda.current_device() == 0 and y.get_device() == last
    with torch.cuda.device(last):
        fastsepconv.separable_conv2d(*arrays, backend="cuda")
        assert torch.cuda.current_device() == last
    assert_close("y", y.cpu().numpy(), fastsepconv.separable_conv2d(*arrays, backend="reference"))


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_by_name(arrays, name, dtype):
    torch = pytest.importorskip("torch")
    on_card = [torch.from_numpy(array).to(getattr(torch, dtype)).cuda() for array in arrays]
    y = fastsepconv.separable_conv2d(*on_card, activation=name)
    doubles = [tensor.double().cpu().numpy() for tensor in on_card]
    true = fastsepconv.separable_conv2d(*doubles, activation=name, backend="reference")
    assert relative_error(y.double().cpu().numpy(), true) <= RELATIVE[dtype]


def test_a_launch_takes_the_host_ten_microseconds_at_most(monkeypatch):
    """The best of many rounds: whatever else runs beside this test only makes a round slower, so that the best one is
    too slow only where a launch itself does too much.
    """
    from fastsepconv.kernels.cuda import launch

    from . import warm_up

    monkeypatch.setattr(launch, "DEBUG", False)  # it waits for the card
    assert warm_up.host_microseconds(rounds=200) <= 10


@pytest.mark.takes_long
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.skipif(not shutil.which(SANITIZER), reason=f"{SANITIZER} is not on the PATH")
def test_small_cases_are_clean(tool):
    """The sanitizer finds nothing on small shapes, both tiers and two dtypes, each array in memory of its own.

    Of memcheck's findings, calls of the driver's that are refused are left out: PyTorch tries some and goes on, and the
    kernels' own become exceptions.
    """
    chosen = "(float32 or bfloat16) and (test_the_same_bits or test_memory_that_begins)"
    if tool == "memcheck":
        chosen += (
            " or test_is_the_reference and (float32 or bfloat16) and ragged and (multiplier or dilation or unequal)"
        )
    options = ["--tool", tool, "--error-exitcode", "77", "--target-processes", "all"]
    command = [SANITIZER, *options, *(["--report-api-errors", "no"] if tool == "memcheck" else []), sys.executable]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTSEPCONV_CUDA_LEDGER": os.devnull, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [*command, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", RESULTS, "-k", chosen],
        cwd=ROOT, env=without_worker() | settings, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def without_worker() -> dict[str, str]:
    """The environment of a process that is nobody's pytest worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
