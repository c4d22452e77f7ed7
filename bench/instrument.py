"""Checks of the instrument itself: what a fair race must show before its ratios are believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from .problems import Layer
from .race import Arena, Budget
from .stats import ratio

SELF_TOLERANCE, ALONE_TOLERANCE, LEFT_TOLERANCE = 0.03, 0.05, 0.01
REPEATS = 3
PROBLEMS = [
    Layer("xception", 19, 728, 728),
    Layer("xception", 74, 128, 256, batch=8),
    Layer("tutorial", 3, 728, 728, batch=64, bias=True),
]


@dataclass(frozen=True)
class Check:
    """One ratio that should be 1."""

    name: str
    ratio: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.ratio - 1) <= self.tolerance

    def __str__(self) -> str:
        word = "ok  " if self.passed else "FAIL"
        return f"{word} {self.ratio:.3f} (1 +- {self.tolerance:.2f})  {self.name}"


def check(provider: str, rivals: list[str], threads: int, budget: Budget, tell: Callable[[Check], None]) -> list[Check]:
    """A provider against itself gives 1; raced against `rivals` it takes the time that it takes alone; and to the one
    whose turn it is the others leave the whole machine.

    Alone is a process that is never stopped, timed while the race's are: a machine's speed may change by a tenth from
    second to second, so both take turns within one. And a few times, in new processes: one is faster or slower than the
    next, by where its memory happens to lie.
    """
    checks: list[Check] = []

    def add(name: str, value: float, tolerance: float) -> None:
        checks.append(Check(name, value, tolerance))
        tell(checks[-1])

    own, alone = f"{provider}#2", f"{provider}#alone"
    against_itself, _ = _ratios([provider, own], provider, own, threads, budget)
    for problem, value in zip(PROBLEMS, against_itself, strict=True):
        add(f"{problem.name}: {provider} against itself", value, SELF_TOLERANCE)
    over_alone, left = _ratios([alone, provider, *rivals], alone, provider, threads, budget)
    for problem, value in zip(PROBLEMS, over_alone, strict=True):
        add(f"{problem.name}: {provider} in a race over {provider} alone", value, ALONE_TOLERANCE)
    add("the machine's share that those who wait leave to the one that runs", left, LEFT_TOLERANCE)
    return checks


def _ratios(labels: list[str], first: str, second: str, threads: int, budget: Budget) -> tuple[list[float], float]:
    """How many times longer `second` takes than `first` in a race of all, for each problem: the median of some.

    Behind it, the least share of the machine that was left to the one whose turn it was.
    """
    found, left = [], 1.0
    for _ in range(REPEATS):
        with Arena(labels, threads, budget, awake=[label for label in labels if label.endswith("#alone")]) as arena:
            values = []
            for problem in PROBLEMS:
                rounds = {result.provider: result.rounds for result in arena.race(problem)}
                values.append(ratio(rounds[first], rounds[second])["ratio"])
                left = min(left, 1 - arena.waiting)
        found.append(values)
    return [median(values) for values in zip(*found, strict=True)], left
