"""Medians, spreads and ratios of measured times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median, quantiles

Rounds = list[list[float]]  # the times of every call, block by block


def summary(rounds: Rounds) -> dict[str, float]:
    """Median and quartiles over all calls of all blocks, seconds."""
    times = [time for block in rounds for time in block]
    low, high = quartiles(times)
    return {"median": median(times), "q25": low, "q75": high, "calls": len(times)}


def ratio(ours: Rounds, theirs: Rounds) -> dict[str, float]:
    """How many times longer they take: the ratio of medians, with the quartiles of the same ratio block by block."""
    whole = median([t for block in theirs for t in block]) / median([t for block in ours for t in block])
    low, high = quartiles([median(b) / median(a) for a, b in zip(ours, theirs, strict=True)])
    return {"ratio": whole, "q25": low, "q75": high}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
