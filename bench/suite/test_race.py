"""Each provider on each problem: `pytest bench --benchmark-only`.

-k picks by name, for example -k "xception and batch1 and forward and 19x19", or a provider with -k "tensorflow".
--benchmark-max-time is the time for each provider and problem, a second by default.
"""

from __future__ import annotations

import warnings

import pytest

from fastsepconv.bench import results
from fastsepconv.bench.problems import NETWORKS, SHAPES, layers, networks
from fastsepconv.bench.providers import RACERS, takes
from fastsepconv.bench.race import DISTURBED

PROBLEMS = [problem for suite in SHAPES for problem in layers(suite)]
PROBLEMS += [problem for name in NETWORKS for problem in networks(name)]


class ReplayClock:
    """A clock that each call of `advance` moves on by the next measured time."""

    def __init__(self):
        self.times, self.now = iter(()), 0.0

    def advance(self) -> None:
        self.now += next(self.times)


CLOCK = ReplayClock()


def race_clock() -> float:
    return CLOCK.now


CASES = [
    pytest.param(problem, provider, id=f"{problem.name}/{provider}".replace("/", "-"),
                 marks=pytest.mark.benchmark(group=problem.name, timer=race_clock))
    for problem in PROBLEMS
    for provider in RACERS
    if takes(provider, problem)
]  # fmt: skip


@pytest.mark.parametrize(("problem", "provider"), CASES)
def test_race(problem, provider, races, benchmark):
    record, times = races.of(problem)
    entry = record["providers"][provider]
    if entry["status"] in ("absent", "unsupported"):
        pytest.skip(f"{entry['status']}: {entry['reason']}")
    assert entry["status"] == "timed", entry["reason"]
    if record["others_share"] > DISTURBED:
        warnings.warn(f"Other processes used {100 * record['others_share']:.0f} % of the machine", stacklevel=1)
    benchmark.extra_info |= extra_info(record, provider, races.run)
    CLOCK.times = iter(times[provider])
    benchmark.pedantic(CLOCK.advance, rounds=len(times[provider]), iterations=1)


def extra_info(record, provider, run):
    """What the race knows beyond the times; `times_<baseline>` is how many times longer this provider takes."""
    entry = record["providers"][provider]
    info = {"problem": record["name"], "provider": provider, "first_call_seconds": entry["first_call_seconds"]}
    info["largest_error"] = entry["largest_error"]
    info["gflops"] = entry["gflops"]
    info |= {f"share_of_{of}": results.share(record, entry, run, of) for of in ("peak", results.limit([record], run))}
    info |= {fact: run[fact] for fact in ("peak_gflops", "copy_gbytes", "threads")}
    info["versions"] = run["versions"][provider]
    info["others_share"] = record["others_share"]
    if "times_baseline" in entry:
        info[f"times_{run['baseline']}"] = entry["times_baseline"]
    return info
