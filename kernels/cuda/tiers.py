"""Which kernels serve a call: for each operation the first row that does; the plain kernels, last, serve everything.

A row's `serves` is asked with the operation's own arguments and answers from sizes and elements alone, without a look
at the card's memory. `launch.log` ("fastsepconv.cuda", at DEBUG) and `launch.listeners` tell which kernels ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import depthwise, pointwise, separable
from .elements import SIMULATED


class Row(NamedTuple):
    """One way to compute an operation: the tier, what computes it, and whether it serves a call's arguments."""

    tier: str
    run: Callable[..., None]
    serves: Callable[..., bool]


def _everything(*arguments: Any) -> bool:
    return True


TABLE: dict[str, tuple[Row, ...]] = {
    "depthwise_forward": (Row("plain", depthwise.forward, _everything),),
    "depthwise_backward": (Row("plain", depthwise.backward, _everything),),
    "pointwise_forward": (Row("plain", pointwise.forward, _everything),),
    "pointwise_backward": (Row("plain", pointwise.backward, _everything),),
    "separable_forward": (Row("plain", separable.forward, _everything),),
    "separable_backward": (Row("plain", separable.backward, _everything),),
}


def run(operation: str, *arguments: Any) -> None:
    """Compute an operation with the first row that serves these arguments; the simulator has the plain kernels only."""
    for row in TABLE[operation]:
        if (row.tier == "plain" or not SIMULATED) and row.serves(*arguments):
            row.run(*arguments)
            return


def explain() -> str:
    """Which operations each tier serves, in words."""
    tiers = dict.fromkeys(row.tier for rows in TABLE.values() for row in rows)
    served = {tier: [name for name, rows in TABLE.items() if any(row.tier == tier for row in rows)] for tier in tiers}
    return ", ".join(
        f"{tier} kernels for {'every operation' if len(names) == len(TABLE) else ' and '.join(names)}"
        for tier, names in served.items()
    )
