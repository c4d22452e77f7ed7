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

from . import ledger

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long is spread over the list: each of several workers begins a stretch of it, and none ends with that.

    The others keep their order, in which neighbours share results.
    """
    long = [item for item in items if item.get_closest_marker("takes_long")]
    others = [item for item in items if not item.get_closest_marker("takes_long")]
    ends = [len(others) * (i + 1) // len(long) for i in range(len(long))]
    if long:
        items[:] = [one for i, item in enumerate(long) for one in (item, *others[(0, *ends)[i] : ends[i]])]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a card is skipped without one, and says what is missing."""
    if item.get_closest_marker("cuda"):
        why_not = "the simulator is no card" if nvidia.is_simulated() else nvidia.obstacle()
        if why_not:
            pytest.skip(f"needs an NVIDIA card: {why_not}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """On a card the tests of a module that names a WAY_TO_A_CARD tell whether it works."""
    report = yield
    way = getattr(getattr(item, "module", None), "WAY_TO_A_CARD", None)
    if way and report.when == "setup" and report.passed:
        ledger.write("begun", way=way)
    if way and report.when == "call":
        ledger.write(report.outcome, way=way)
    return report
