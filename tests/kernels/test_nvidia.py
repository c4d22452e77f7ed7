"""What is said of NVIDIA's driver and cards, and of what keeps the CUDA kernels from running."""

from __future__ import annotations

import re
import sys
import types

import pytest

from fastsepconv.kernels import nvidia
from fastsepconv.kernels.nvidia import Card

NEW, OLD = Card("A card", (9, 0)), Card("An old card", (7, 5))


class Driver:
    """Stands for NVIDIA's driver library."""

    def __init__(self, error=0, cards=(NEW,)):
        self.error, self.cards = error, cards

    def cuInit(self, flags):
        return self.error

    def cuDriverGetVersion(self, version):
        version._obj.value = 13020

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.cards)

    def cuDeviceGetName(self, name, length, device):
        name.value = self.cards[device].name.encode()

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.cards[device].capability[attribute - 75]


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(), ("for CUDA 13.2", [NEW])),
        (Driver(cards=(NEW, OLD)), ("for CUDA 13.2", [NEW, OLD])),
        (Driver(error=100), ("there, without a card", [])),
        (Driver(error=3), ("cuInit fails with error 3", [])),
        (OSError("no such library"), ("none", [])),
    ],
)
def test_driver_and_cards_are_told(monkeypatch, driver, expected):
    def load(name):
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(nvidia.ctypes, "CDLL", load)
    assert nvidia.look() == expected


@pytest.mark.parametrize(
    ("found", "installed", "simulated", "sentence"),
    [
        (("for CUDA 13.0", [NEW, OLD]), True, False, None),
        (("none", []), False, True, None),
        (
            ("for CUDA 13.0", [NEW]),
            False,
            False,
            r"numba-cuda is not installed, which the extra `fastsepconv\[cuda13\]` br",
        ),
        (("none", []), True, False, "there is no NVIDIA driver"),
        (("there, without a card", []), True, False, r"no card is seen \(the NVIDIA driver is there, without a card\)"),
        (
            ("for CUDA 12.4", [OLD]),
            True,
            False,
            r"the card, An old card \(7\.5\), is too old: compute capability 8\.0 or newer",
        ),
        (
            ("for CUDA 12.4", [OLD, OLD]),
            True,
            False,
            r"the cards, An old card \(7\.5\), An old card \(7\.5\), are too old: compute capability 8\.0 or newer",
        ),
        (("for CUDA 13.0", [OLD, NEW]), True, False, None),
    ],
)
def test_the_obstacle_is_one_sentence(monkeypatch, found, installed, simulated, sentence):
    monkeypatch.setattr(nvidia, "look", lambda: found)
    monkeypatch.setattr(nvidia, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(nvidia, "is_simulated", lambda: simulated)
    monkeypatch.setattr(nvidia, "_finds_compiler", lambda: True)
    told = nvidia.obstacle()
    if sentence is None:
        assert told is None
    else:
        assert re.match(sentence, told) and not told.endswith(".")


@pytest.mark.parametrize("missing", ["the library", "its functions", "nothing"])
def test_a_compiler_that_is_not_found_is_told(monkeypatch, missing):
    def load():
        if missing == "the library":
            raise RuntimeError('Failure finding "libnvvm.so"')

    nvvm, libs = types.ModuleType("nvvm"), types.ModuleType("libs")
    nvvm.NVVM = load
    libs.get_libdevice = lambda: None if missing == "its functions" else "libdevice.10.bc"
    for module in (nvvm, libs):
        monkeypatch.setitem(sys.modules, f"numba.cuda.cudadrv.{module.__name__}", module)
    monkeypatch.setattr(nvidia, "look", lambda: ("for CUDA 13.0", [NEW]))
    monkeypatch.setattr(nvidia, "find_spec", lambda name: object())
    monkeypatch.setattr(nvidia, "is_simulated", lambda: False)
    told = nvidia.obstacle()
    if missing == "nothing":
        assert told is None
    else:
        assert re.match(r"numba-cuda does not find NVIDIA's compiler, NVVM, .*cuda13.*CUDA_HOME", told)


def test_the_compiler_is_found_here():
    pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")
    assert nvidia._finds_compiler()
