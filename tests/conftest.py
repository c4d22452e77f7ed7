"""What the tests share: a quiet TensorFlow on the CPU, seeded numbers, one run a backend."""

from __future__ import annotations

import os
import zlib
from importlib.util import find_spec

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow" if find_spec("tensorflow") else "torch")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import pytest

from fastsepconv import dispatch
from fastsepconv.kernels import nvidia

# The CPU's kernels are not optional: where they cannot run, the tests that need them fail.
BACKENDS = ("reference", "cpu", *(name for name in dispatch.runnable() if name not in ("reference", "cpu")))


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """The name of a backend that can run here."""
    return request.param


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a card is skipped without one, and says what is missing."""
    if item.get_closest_marker("cuda"):
        why_not = "the simulator is no card" if nvidia.is_simulated() else nvidia.obstacle()
        if why_not:
            pytest.skip(f"needs an NVIDIA card: {why_not}")
