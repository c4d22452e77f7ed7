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
from .race import Arena, Budget, Result
from .stats import ratio, summary

SELF_TOLERANCE, ALONE_TOLERANCE = 0.03, 0.05
REPEATS = 4
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
    """A provider against itself gives 1; raced against `rivals` it takes the time that it takes alone.

    Each several times, in new processes: one is faster or slower than the next, by where its memory happens to lie, and
    the machine's speed may change by a tenth from second to second. What slows a process down does so for a while, so
    the fastest race is compared with the fastest time alone.
    """
    checks: list[Check] = []

    def add(name: str, value: float, tolerance: float) -> None:
        checks.append(Check(name, value, tolerance))
        tell(checks[-1])

    pairs = [_races([provider, f"{provider}#2"], threads, budget) for _ in range(REPEATS)]
    for problem, results in zip(PROBLEMS, zip(*pairs, strict=True), strict=True):
        value = median(ratio(first.rounds, second.rounds)["ratio"] for first, second in results)
        add(f"{problem.name}: {provider} against itself", value, SELF_TOLERANCE)
    alone, raced = [], []
    for _ in range(REPEATS):
        alone.append(_times_alone(provider, threads, budget))
        raced.append([summary(results[0].rounds)["median"] for results in _races([provider, *rivals], threads, budget)])
    for problem, quiet, beside in zip(PROBLEMS, zip(*alone, strict=True), zip(*raced, strict=True), strict=True):
        add(f"{problem.name}: {provider} in a race over {provider} alone", min(beside) / min(quiet), ALONE_TOLERANCE)
    return checks


def _races(labels: list[str], threads: int, budget: Budget) -> list[list[Result]]:
    """The results of a race for each problem, in new processes."""
    with Arena(labels, threads, budget) as arena:
        return [arena.race(problem) for problem in PROBLEMS]


def _times_alone(provider: str, threads: int, budget: Budget) -> list[float]:
    """The median seconds for each problem of the only process there is, in one block without a stop."""
    process = Contestant(provider, threads)
    try:
        process.ask("hello")
        return [_time_alone(process, problem, budget) for problem in PROBLEMS]
    finally:
        process.close()


def _time_alone(process: Contestant, problem: Layer, budget: Budget) -> float:
    with tempfile.TemporaryDirectory(prefix="fastsepconv-bench-") as folder:
        data.write(problem, Path(folder))
        process.ask("prepare", problem=to_dict(problem), folder=folder, results=f"{folder}/results")
    answer = process.ask("block", seconds=budget.seconds, calls=budget.calls, warm_seconds=budget.warm_seconds)
    process.ask("forget")
    return median(answer["times"])
