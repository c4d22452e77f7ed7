"""Kernels compiled ahead, by another process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastsepconv.cli import ahead

USE = """
import json
import numpy as np, fastsepconv
from fastsepconv.kernels.cpu import jit
x, depthwise, pointwise = np.ones((2, 7, 5, 3)), np.ones((3, 3, 3, 1)), np.ones((1, 1, 3, 4))
y = fastsepconv.separable_conv2d(x, depthwise, pointwise, strides=2, backend="cpu")
fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, y, strides=2, backend="cpu")
print(json.dumps([jit.state()["compiled"], jit.state()["loaded"]]))
"""


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=300).stdout


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEPCONV_CACHE_DIR", str(tmp_path))
    run("-m", "fastsepconv.cli.ahead", "float64")
    compiled, loaded = json.loads(run("-c", USE))
    assert compiled == 0
    assert loaded > 5


@pytest.mark.parametrize("started", [[sys.executable, "-c", "1/0"], [sys.executable, "-c", "input()"]])
def test_a_process_that_fails_or_takes_long_is_no_matter(monkeypatch, started):
    processes = []

    def popen(command, **options):
        assert command[1:] == ["-m", "fastsepconv.cli.ahead", "float64"]
        processes.append(real(started, **{**options, "stdin": subprocess.PIPE}))
        return processes[-1]

    real = subprocess.Popen
    monkeypatch.setattr(ahead.subprocess, "Popen", popen)
    with ahead.compiled_meanwhile("float64"):
        pass
    assert processes[0].returncode not in (None, 0)
