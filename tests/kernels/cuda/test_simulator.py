"""The CUDA backend in Numba's simulator: each group of tests in a process of its own that is started with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SIMULATED = "tests/kernels/cuda/simulated"
GROUPS = {
    "the kernels": [f"{SIMULATED}/check_kernels.py"],
    "arrays on a card": [f"{SIMULATED}/check_device_arrays.py"],
    "the array API beside Keras": ["tests/test_ops.py", "tests/test_ops_arrays.py", "-k", "cuda"],
    "Keras's layers on TensorFlow": [f"{SIMULATED}/check_tensorflow.py"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_in_the_simulator(group):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *GROUPS[group]]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEPCONV_")}
    settings |= {"NUMBA_ENABLE_CUDASIM": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 5 and "skipped" not in done.stdout, done.stdout
