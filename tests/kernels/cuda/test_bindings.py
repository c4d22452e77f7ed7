"""What the backend hands to NVIDIA's own Python bindings is what they take. Other tests put a double in their place.

A driver library is built that answers without a card; a process that loads it goes the whole way down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("stub_driver.c")
CALLS = """
import numpy as np
import fastsepconv
from fastsepconv.kernels import nvidia
from fastsepconv.kernels.cuda import driver
from tests.card_arrays import InterfaceArray

print(nvidia.look(), nvidia.obstacle())
rng = np.random.default_rng(0)
x, depthwise, pointwise, dy = (
    rng.random(shape, np.float32) for shape in ((1, 4, 4, 8), (3, 3, 8, 1), (8, 8), (1, 4, 4, 8))
)
y = fastsepconv.separable_conv2d(x, depthwise, pointwise, padding="same", backend="cuda")
fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, dy, padding="same", backend="cuda")
fastsepconv.pointwise_conv2d(InterfaceArray(x), InterfaceArray(pointwise))
stream = driver.Stream(1, driver.device(1))
driver.order_after(stream, 7)
driver.allow_shared_memory(0x99, 100000, stream.device)
print(y.shape, driver.device_of(8), driver.device_of(5000), driver.is_capturing(stream), stream.device.shared_limit)
print(driver.is_capturing(stream._replace(handle=99)))
try:
    driver.call("Nothing", lambda: (driver.api.CUresult.CUDA_ERROR_UNKNOWN,))
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The folder of a libcuda.so.1."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler for Linux here")
    folder = tmp_path_factory.mktemp("driver")
    target = str(folder / "libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", target, str(SOURCE)], check=True)
    return folder


def test_nvidias_bindings_take_what_they_are_given(toolkit, library, tmp_path):
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FASTSEPCONV_")}
    settings |= {
        "LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(ROOT), "FASTSEPCONV_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "0", "FASTSEPCONV_CUDA_TIER": "plain",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    cards = "[Card(name='A stub', capability=(9, 0)), Card(name='A stub', capability=(9, 0))]"
    assert done.stdout.splitlines() == [
        f"('for CUDA 13.0', {cards}) None",
        "(1, 4, 4, 8) None 1 False 232448",
        "True",
        "Nothing failed: a word: a word",
    ]
    lines = done.stderr.splitlines()
    launches = [line for line in lines if line.startswith("launch")]
    assert len(launches) == 2 + 9 + 1
    assert all("on 1,1,1 of 256,1,1 with 0 on 0x2 in 0x1000, first" in line for line in launches[:-1])
    assert "on 0x7 in 0x1001, first 16, extra 0" in launches[-1]
    assert {line for line in lines if line.startswith("load")} == {"load ELF with 0 and 0 options"}
    allocated, freed = ([line for line in lines if line.startswith(word)] for word in ("allocate", "free"))
    assert len(allocated) == len(freed) > 0
    assert [line for line in lines if line.startswith("synchronize")] == ["synchronize 0x2"] * 2
    assert lines[-4:] == [
        "event 2", "record 0x55 on 0x7", "0x1 waits for 0x55", "attribute 8 of 0x99 on 1 is 100000",
    ]  # fmt: skip
