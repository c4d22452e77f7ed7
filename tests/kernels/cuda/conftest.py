"""What these tests share. Those that need numba-cuda and NVIDIA's toolkit skip where they are not installed."""

from __future__ import annotations

import importlib.util

import pytest

from fastsepconv.kernels import nvidia


@pytest.fixture
def toolkit():
    """Numba's compiler for cards, without its simulator."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed: pip install 'fastsepconv[cuda13]'")
    if nvidia.is_simulated():
        pytest.skip("NUMBA_ENABLE_CUDASIM=1 puts the simulator in the compiler's place")


@pytest.fixture
def double(toolkit, monkeypatch, tmp_path):
    """A driver that stands for NVIDIA's, and a cache folder of its own."""
    from fastsepconv.kernels.cuda import driver, launch
    from tests.kernels.cuda.driver_double import DriverDouble

    monkeypatch.setenv("FASTSEPCONV_CACHE_DIR", str(tmp_path))
    stand_in = DriverDouble()
    monkeypatch.setattr(driver, "api", stand_in)
    driver.device.cache_clear()
    for kernel in launch.KERNELS.values():
        kernel._loaded.clear()
    yield stand_in
    driver.device.cache_clear()
    for kernel in launch.KERNELS.values():
        kernel._loaded.clear()
