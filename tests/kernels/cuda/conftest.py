"""What these tests share. Those that need numba-cuda and NVIDIA's toolkit skip where they are not installed."""

from __future__ import annotations

import contextlib
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
    from tests.kernels.cuda.driver_double import DriverDouble

    for variable in ("FASTSEPCONV_CUDA_TIER", "FASTSEPCONV_TF32"):
        monkeypatch.delenv(variable, raising=False)
    with in_place_of_the_driver(DriverDouble(), monkeypatch, tmp_path) as stand_in:
        yield stand_in


@pytest.fixture
def emulated(toolkit, monkeypatch, tmp_path):
    """A driver whose launches run what they launch, in an emulation; the fast tier is asked for."""
    from tests.kernels.cuda.emulated_card import EmulatedCard

    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "fast")
    with in_place_of_the_driver(EmulatedCard(monkeypatch), monkeypatch, tmp_path) as stand_in:
        yield stand_in


@contextlib.contextmanager
def in_place_of_the_driver(stand_in, monkeypatch, folder):
    from fastsepconv.kernels.cuda import driver, launch

    def forget():
        driver.device.cache_clear()
        for kernel in launch.KERNELS.values():
            kernel._loaded.clear()

    monkeypatch.setenv("FASTSEPCONV_CACHE_DIR", str(folder))
    monkeypatch.setattr(driver, "api", stand_in)
    forget()
    yield stand_in
    forget()
