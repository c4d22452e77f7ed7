"""Keras on TensorFlow on a card: its tensors where they are, by the ops' kernels for it.

In a process of its own: PyTorch, which the other tests on a card need, would find the memory taken.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda
WAY_TO_A_CARD = "Keras on TensorFlow"
ROOT = Path(__file__).parents[2]
CHECKS = "tests/bridge/check_tensorflow_card.py"


@pytest.mark.parametrize("tier", ["plain", "fast"])
def test_tensors_are_computed_where_they_are(tier):
    missing = [name for name in ("tensorflow", "keras") if not find_spec(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    settings |= {"KERAS_BACKEND": "tensorflow", "FASTSEPCONV_CUDA_TIER": tier, "NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CHECKS],
        cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if "TensorFlow sees no GPU" in done.stdout:
        pytest.skip("TensorFlow sees no GPU")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 150
