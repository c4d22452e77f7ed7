"""Checks of the instrument itself: what a fair race must show before its ratios are believed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from . import data
from .contestant import Contestant
from .problems import Layer, to_dict
from .race import Arena, Budget
from .stats import ratio, summary

SELF_TOLERANCE, ALONE_TOLERANCE = 0.03, 0.05
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
    """A provider against itself gives 1; raced against `rivals` it takes the time that it takes alone."""
    checks: list[Check] = []

    def add(name: str, value: float, tolerance: float) -> None:
        checks.append(Check(name, value, tolerance))
        tell(checks[-1])

    with Arena([provider, f"{provider}#2"], threads, budget) as arena:
        for problem in PROBLEMS:
            first, second = arena.race(problem)
            value = ratio(first.rounds, second.rounds)["ratio"]
            add(f"{problem.name}: {provider} against itself", value, SELF_TOLERANCE)
    before = [alone(provider, problem, threads, budget) for problem in PROBLEMS]
    with Arena([provider, *rivals], threads, budget) as arena:
        raced = [summary(arena.race(problem)[0].rounds)["median"] for problem in PROBLEMS]
    after = [alone(provider, problem, threads, budget) for problem in PROBLEMS]
    for problem, first_alone, in_race, then_alone in zip(PROBLEMS, before, raced, after, strict=True):
        value = in_race / ((first_alone + then_alone) / 2)
        add(f"{problem.name}: {provider} in a race over {provider} alone", value, ALONE_TOLERANCE)
    return checks


def alone(provider: str, problem: Layer, threads: int, budget: Budget) -> float:
    """The median seconds of a provider in the only process there is, in one block without a stop."""
    process = Contestant(provider, threads)
    try:
        with tempfile.TemporaryDirectory(prefix="fastsepconv-bench-") as folder:
            data.write(problem, Path(folder))
            process.ask("hello")
            process.ask("prepare", problem=to_dict(problem), folder=folder, results=f"{folder}/results")
        answer = process.ask("block", seconds=budget.seconds, calls=budget.calls, warm_seconds=budget.warm_seconds)
        return median(answer["times"])
    finally:
        process.close()
