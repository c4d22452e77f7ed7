"""Which kernels serve a call: for each operation the first row that does; the plain kernels, last, serve everything.

A row's `serves` is asked with the operation's own arguments and answers from sizes, elements and addresses alone,
without a look at the card's memory. The fast rows are asked where
FASTSEPCONV_CUDA_TIER=fast says so, and not loaded before. `launch.log` ("fastsepconv.cuda", at DEBUG) and
`launch.listeners` tell which kernels ran.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from . import depthwise, pointwise, separable, settings
from .elements import SIMULATED

HAVE_RUN = "the README tells which have run on a card"


class Row(NamedTuple):
    """One way to compute an operation: the tier, what computes it, and whether it serves a call's arguments."""

    tier: str
    run: Callable[..., None]
    serves: Callable[..., bool]


def _everything(*arguments: Any) -> bool:
    return True


def _later(module: str, name: str) -> Callable[..., Any]:
    """The function of that name in a module that is loaded at the first call."""
    find = functools.cache(lambda: getattr(importlib.import_module(f".{module}", __package__), name))

    def call(*arguments: Any) -> Any:
        return find()(*arguments)

    return call


def _rows(module: str, way: str, serves: str, plain: Callable[..., None]) -> tuple[Row, ...]:
    """The fast tier's `way` in a module, where its `serves` allows, before the plain kernels."""
    return Row("fast", _later(module, way), _later(module, serves)), Row("plain", plain, _everything)


TABLE: dict[str, tuple[Row, ...]] = {
    "depthwise_forward": _rows("fast_depthwise", "forward", "serves_forward", depthwise.forward),
    "depthwise_backward": _rows("fast_depthwise", "backward", "serves_backward", depthwise.backward),
    "pointwise_forward": _rows("fast_pointwise", "forward", "serves", pointwise.forward),
    "pointwise_backward": _rows("fast_pointwise", "backward", "serves", pointwise.backward),
    "separable_forward": _rows("fast_separable", "forward", "serves", separable.forward),
    "separable_backward": _rows("fast_separable", "backward", "serves", separable.backward),
}


def run(operation: str, *arguments: Any) -> None:
    """Compute an operation with the first row that may be used and serves these arguments.

    Raises:
        ValueError: FASTSEPCONV_CUDA_TIER names no tier.
    """
    usable = _usable()
    for row in TABLE[operation]:
        if row.tier in usable and row.serves(*arguments):
            row.run(*arguments)
            return


def _usable() -> tuple[str, ...]:
    """The tiers that may be used; the simulator has the plain kernels only."""
    return ("fast", "plain") if settings.tier() == "fast" and not SIMULATED else ("plain",)


def explain() -> str:
    """Which kernels calls may use, in words.

    Raises:
        ValueError: FASTSEPCONV_CUDA_TIER names no tier, or FASTSEPCONV_TF32 is neither 0 nor 1.
    """
    numbers, plain = "TF32" if settings.tf32() else "three TF32 products", "plain kernels for every operation"
    if "fast" in _usable():
        return f"fast kernels where they serve (float32 as {numbers}), else {plain}; {HAVE_RUN}"
    if SIMULATED:
        return plain
    return f"{plain}, and {settings.TIER}=fast asks for faster ones; {HAVE_RUN}"
