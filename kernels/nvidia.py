"""What NVIDIA's driver says is here, and whether the CUDA kernels can run: asked without loading them."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from typing import NamedTuple

LEAST_CAPABILITY = (8, 0)  # what the kernels are compiled and assembled for at least
_MAJOR, _MINOR = 75, 76  # the driver's numbers for the halves of a card's compute capability
_NO_CARD = 100
_BRINGS_IT = "which the extra `fastsepconv[cuda13]` brings (or `fastsepconv[cuda12]`)"


class Card(NamedTuple):
    """A card's name and compute capability."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} ({_dotted(self.capability)})"


def look() -> tuple[str, list[Card]]:
    """A word on the NVIDIA driver, and the cards that it offers."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "none", []
    error = driver.cuInit(0)
    if error:
        return ("there, without a card" if error == _NO_CARD else f"cuInit fails with error {error}"), []
    version, count, name, part = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    cards = []
    for device in range(count.value):
        driver.cuDeviceGetName(name, len(name), device)
        capability = []
        for attribute in (_MAJOR, _MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            capability.append(part.value)
        cards.append(Card(name.value.decode(errors="replace"), (capability[0], capability[1])))
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}", cards


def is_simulated() -> bool:
    """Whether Numba runs CUDA kernels as Python (NUMBA_ENABLE_CUDASIM=1, set before it is imported)."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def obstacle() -> str | None:
    """Why the CUDA kernels cannot run here, in one sentence without its period; None: they can."""
    if is_simulated():
        return None
    if find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed, {_BRINGS_IT}"
    driver, cards = look()
    if driver == "none":
        return "there is no NVIDIA driver (libcuda cannot be loaded)"
    if not cards:
        return f"no card is seen (the NVIDIA driver is {driver})"
    if all(card.capability < LEAST_CAPABILITY for card in cards):
        old = f"the card, {cards[0]}, is" if len(cards) == 1 else f"the cards, {', '.join(map(str, cards))}, are"
        return f"{old} too old: compute capability {_dotted(LEAST_CAPABILITY)} or newer is needed"
    if not _finds_compiler():
        return f"numba-cuda does not find NVIDIA's compiler, NVVM, {_BRINGS_IT}; CUDA_HOME names a toolkit elsewhere"
    return None


def _finds_compiler() -> bool:
    """Whether numba-cuda finds what turns its kernels into PTX: a library, and another of functions for cards."""
    try:
        from numba.cuda.cudadrv.libs import get_libdevice
        from numba.cuda.cudadrv.nvvm import NVVM

        NVVM()
        return get_libdevice() is not None
    except Exception:  # of many kinds, as numba-cuda's version and what is missing have it
        return False


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
