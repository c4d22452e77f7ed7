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
