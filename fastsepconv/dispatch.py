"""Which backend runs a call: an ordered list of backends, each able to say why it cannot run here.

>>> from fastsepconv import dispatch
>>> print(dispatch.explain())
cpu, since it is the first of cpu, reference that can run here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from . import checks
from .kernels import nvidia

ENVIRONMENT = "FASTSEPCONV_BACKEND"


def _cpu_obstacle() -> str | None:
    try:
        _load("kernels.cpu")
    except ImportError as error:
        return f"the Numba kernels cannot be loaded ({error})"
    return None


class Backend(NamedTuple):
    """A set of kernels: its name, the module that offers them, and why it cannot run here (None: it can)."""

    name: str
    module: str
    obstacle: Callable[[], str | None]
    automatic: bool = True  # whether "auto" may take it for arrays in the computer's own memory


# "auto" takes the first that can. CUDA's kernels would copy what is not on the card, so they want to be asked for.
BACKENDS = (
    Backend("cpu", "kernels.cpu", _cpu_obstacle),
    Backend("cuda", "kernels.cuda", nvidia.obstacle, automatic=False),
    Backend("reference", "formulas", lambda: None),
)
NAMES = ("auto", *(backend.name for backend in BACKENDS))

_chosen: str | None = None


class Pick(NamedTuple):
    """A backend, and why it is that one."""

    name: str
    reason: str
    obstacles: dict[str, str]  # why those that were passed over cannot run here

    def __str__(self) -> str:
        passed_over = "".join(f" {name}: {why}." for name, why in self.obstacles.items())
        return f"{self.name}, since {self.reason}.{passed_over}"


def set_backend(name: str) -> None:
    """Choose the backend for every later call of this process that does not name its own.

    Args:
        name: "auto" (the fastest that can run here), "cpu" (Numba kernels), "cuda" (Numba kernels on an
            NVIDIA card; NumPy arrays are copied there and back, arrays on the card are not), or "reference" (the
            formulas in plain float64 NumPy: slow, for checking). Under "auto" arrays on a card run on "cuda".
            The README tells what of "cuda" has been run on a card.

    Raises:
        ValueError: the name is none of these, or that backend cannot run here; the message says what is missing.

    Example:
        >>> fastsepconv.set_backend("reference")
        >>> fastsepconv.get_backend()
        'reference'
    """
    global _chosen
    explain(checks.one_of("backend", name, NAMES))
    _chosen = name


def get_backend() -> str:
    """The name given to `set_backend`, else that in the environment variable FASTSEPCONV_BACKEND, else "auto"."""
    if _chosen is not None:
        return _chosen
    return checks.one_of(ENVIRONMENT, os.environ.get(ENVIRONMENT, "auto"), NAMES)


def explain(backend: str | None = None) -> Pick:
    """The backend that a call with this `backend=` runs on, and why; the Pick prints as a sentence.

    Raises:
        ValueError: there is no such backend, or it cannot run here.
    """
    asked = get_backend() if backend is None else checks.one_of("backend", backend, NAMES)
    obstacles: dict[str, str] = {}
    for candidate in BACKENDS:
        if not (candidate.automatic if asked == "auto" else candidate.name == asked):
            continue
        why_not = _obstacle(candidate)
        if why_not is None:
            automatic = ", ".join(backend.name for backend in BACKENDS if backend.automatic)
            first = f"it is the first of {automatic} that can run here"
            return Pick(candidate.name, first if asked == "auto" else "it was asked for", obstacles)
        obstacles[candidate.name] = why_not
    able = " or ".join(repr(name) for name in ("auto", *runnable()))
    raise checks.invalid("backend", f"one that can run here, {able}; {'; '.join(obstacles.values())}", asked)


def runnable() -> tuple[str, ...]:
    """The names of the backends that can run here."""
    return tuple(backend.name for backend in BACKENDS if _obstacle(backend) is None)


def obstacle(name: str) -> str | None:
    """Why the backend of that name cannot run here, in one sentence without its period; None: it can."""
    return next(_obstacle(backend) for backend in BACKENDS if backend.name == name)


def kernels(backend: str | None = None) -> ModuleType:
    """The module whose kernels a call with this `backend=` uses."""
    return _kernels(get_backend() if backend is None else checks.one_of("backend", backend, NAMES))


def kernels_on_card(backend: str | None = None) -> ModuleType:
    """The same for a call whose arrays are on a card: "auto" is "cuda" there, and nothing else can take them."""
    asked = get_backend() if backend is None else checks.one_of("backend", backend, NAMES)
    if asked not in ("auto", "cuda"):
        raise checks.invalid("backend", "'auto' or 'cuda' for arrays on a card", asked)
    return _kernels("cuda")


@cache
def _kernels(asked: str) -> ModuleType:
    pick = explain(asked)
    if asked == "auto" and "cpu" in pick.obstacles:
        warnings.warn(f"fastsepconv runs on the slow backend {pick}", RuntimeWarning, stacklevel=2)
    return _load(next(backend.module for backend in BACKENDS if backend.name == pick.name))


@cache
def _obstacle(backend: Backend) -> str | None:
    return backend.obstacle()


def _load(module: str) -> ModuleType:
    return import_module(f"{__package__}.{module}")
