"""Races behind pytest-benchmark: the first test of a problem races all providers that were selected for it.

The times are those of the race; pytest-benchmark is given them through a clock of its own, so that its tables, saved
files, comparisons and histograms are made of fair times.
"""

from __future__ import annotations

import pytest

from fastsepconv.bench import machine, results
from fastsepconv.bench.providers import PROVIDERS
from fastsepconv.bench.race import Arena, Budget


class Races:
    """Each problem's race, run when its first test asks for it; a problem's tests follow one another."""

    def __init__(self, config, wanted: dict[str, list[str]]):
        seconds, calls = float(config.getoption("benchmark_max_time")), int(config.getoption("benchmark_min_rounds"))
        self.budget = Budget(seconds=seconds, calls=max(1, -(-calls // Budget.rounds)))
        self.wanted = wanted
        self.labels = [name for name in PROVIDERS if any(name in names for names in wanted.values())]
        self.arena: Arena | None = None
        self.latest: tuple[dict, dict[str, list[float]]] = {}, {}

    def of(self, problem) -> tuple[dict, dict[str, list[float]]]:
        """The problem's record, and each provider's times."""
        if self.arena is None:
            threads = machine.available_cores()
            peak, copying = machine.peak(threads), machine.copying(threads)
            self.arena = Arena(self.labels, threads, self.budget).__enter__()
            self.run = results.begin(self.arena, peak, copying)
        if self.latest[0].get("name") != problem.name:
            raced = self.arena.race(problem, self.wanted[problem.name])
            record = results.record(problem, self.arena, raced, self.run["baseline"])
            times = {result.provider: [time for block in result.rounds for time in block] for result in raced}
            self.latest = record, times
        return self.latest

    def close(self) -> None:
        if self.arena is not None:
            self.arena.__exit__()


@pytest.fixture(scope="session")
def races(request):
    """Only what was selected is started: providers deselected with -k cost nothing."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if {"problem", "provider"} <= params.keys():
            wanted.setdefault(params["problem"].name, []).append(params["provider"])
    found = Races(request.config, wanted)
    yield found
    found.close()
