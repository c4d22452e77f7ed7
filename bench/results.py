"""A run as JSON: the code, the machine, the settings, and for each problem what each provider did.

A check of the instrument is a document of the same kind, with "checks" in place of "problems".
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import reduce
from itertools import groupby
from pathlib import Path
from statistics import median

from . import gate, machine, revision, stats
from .instrument import Check
from .problems import FLOAT32, Layer, Problem, to_dict
from .providers import PROVIDERS
from .race import Arena, Budget, Result

OURS = "fastsepconv"
FORMAT = 1


def begin(arena: Arena, peak: dict[str, float], copying: dict[str, float], dtype: str = FLOAT32) -> dict:
    """A run without problems yet, which are of one dtype; the peak is that dtype's, `copying` is `machine.copying`."""
    return {
        **_circumstances(arena.threads, arena.budget),
        "seed": arena.seed,
        "dtype": dtype,
        "peak_gflops": peak,
        "copy_gbytes": copying,
        "versions": arena.versions,
        "absent": arena.absent,
        "baseline": _baseline(arena),
        "problems": [],
    }


def checked(checks: list[Check], threads: int, budget: Budget) -> dict:
    """What a check of the instrument found."""
    found = [vars(check) | {"passed": check.passed} for check in checks]
    return {**_circumstances(threads, budget), "checks": found}


def _circumstances(threads: int, budget: Budget) -> dict:
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": revision.describe(),
        "machine": machine.describe(),
        "threads": threads,
        "budget": vars(budget),
    }


def _baseline(arena: Arena) -> str | None:
    """Ours where it can run, else the first provider that can."""
    present = [label for label in arena.labels if label not in arena.absent]
    return OURS if OURS in present else next(iter(present), None)


def record(problem: Problem, arena: Arena, results: list[Result], baseline: str | None) -> dict:
    """One problem: per provider the times and, where the baseline was timed too, how many times longer it took."""
    ours = next((result for result in results if result.provider == baseline and result.status == "timed"), None)
    moved = {"bytes_moved": problem.bytes_moved} if isinstance(problem, Layer) else {}
    return to_dict(problem) | {
        "name": problem.name,
        "flops": arena.flops,
        **moved,
        "others_share": round(arena.disturbance, 3),
        "error_bound": gate.bound(problem),
        "providers": {result.provider: _provider(result, arena.flops, ours) for result in results},
    }


def _provider(result: Result, flops: int, ours: Result | None) -> dict:
    entry: dict = {"status": result.status}
    if result.reason:
        entry["reason"] = result.reason
    if result.errors:
        entry["largest_error"] = max(result.errors.values())
    if result.status != "timed":
        return entry
    times = stats.summary(result.rounds)
    entry |= {
        "first_call_seconds": result.first_call_seconds,
        "seconds": times,
        "round_medians": [median(block) for block in result.rounds],
        "gflops": flops / times["median"] / 1e9,
    }
    if ours is not None and ours is not result:
        entry["times_baseline"] = stats.ratio(ours.rounds, result.rounds)
    return entry


def title(label: str) -> str:
    """How a provider is called in tables; a second copy of one keeps its mark."""
    name, mark, rest = label.partition("#")
    return PROVIDERS[name].title + mark + rest


def merge(documents: list[dict]) -> dict:
    """Runs of the same machine, settings and versions as one, with the "checks" of its instrument and the "commits".

    Raises ValueError where they differ, and where there are checks alone.
    """
    runs = [document for document in documents if "problems" in document]
    if not runs:
        raise ValueError("Invalid value for argument `runs`. Expected a race. Received: checks of the instrument alone")
    merged = dict(runs[0])
    for document in documents:
        for fact in ("machine", "threads"):
            _expect_same(fact, merged[fact], document[fact])
    for run in runs[1:]:
        _expect_same("baseline", merged["baseline"], run["baseline"])
        _expect_same("dtype", dtype_of(merged), dtype_of(run))
        for label in run["versions"].keys() & merged["versions"].keys():
            _expect_same(f"{label} versions", merged["versions"][label], run["versions"][label])
        merged["versions"] = merged["versions"] | run["versions"]
        merged["peak_gflops"] = machine.higher(merged["peak_gflops"], run["peak_gflops"])
        merged["problems"] = merged["problems"] + run["problems"]
    # Runs of before copying was measured have none.
    copying = [run["copy_gbytes"] for run in runs if "copy_gbytes" in run]
    if copying:
        merged["copy_gbytes"] = reduce(machine.higher, copying)
    # Runs of before commits were recorded have none.
    merged["commits"] = list(dict.fromkeys(revision.short(run.get("code")) for run in runs))
    merged["checks"] = [check for document in documents for check in document.get("checks", ())]
    return merged


def _expect_same(fact: str, first, second) -> None:
    if first != second:
        raise ValueError(
            f"Invalid value for argument `runs`. Expected the same {fact} in all. Received: {first} and {second}"
        )


def dtype_of(run: dict) -> str:
    """What its problems are of: float32 in a run that does not tell."""
    return run.get("dtype", FLOAT32)


def limit(records: list[dict], run: dict) -> str:
    """What such problems are held against: "copy" for depthwise ones where the run tells it, "peak" for others."""
    told = "copy_gbytes" in run and all(record["op"] == "depthwise" and "bytes_moved" in record for record in records)
    return "copy" if told else "peak"


def share(record: dict, entry: dict, run: dict, of: str) -> float:
    """A timed provider's rate over that limit of the machine, both with the run's number of threads.

    A small image may have more than all of "copy", since caches move faster what they hold, and so may a large one:
    its result is written past the caches, and lines that an ordinary store writes to are read first.
    """
    threads = str(run["threads"])
    if of == "peak":
        return entry["gflops"] / run["peak_gflops"][threads]
    return record["bytes_moved"] / entry["seconds"]["median"] / 1e9 / run["copy_gbytes"][threads]


def groups(run: dict) -> list[tuple[str, list[dict]]]:
    """The problems of one suite, batch, pass and way of taking weights, under the name of the group."""
    return [(name, list(records)) for name, records in groupby(run["problems"], key=_group)]


def _group(record: dict) -> str:
    kind = "network" if record["op"] == "network" else "layers"
    words = [f"{record['suite']} {kind}", f"batch {record['batch']}", record["mode"]]
    return ", ".join(words + ["weights rotated"] * (record.get("weight_sets", 1) > 1))


def save(run: dict, path: Path) -> None:
    path.write_text(json.dumps(_rounded(run), indent=1) + "\n")


def load(path: Path) -> dict:
    """A run, or a check of the instrument. Raises ValueError for any other file."""
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Invalid value for argument `run`. Expected a run. Received: {path} ({error})") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"Invalid value for argument `run`. Expected a run of format {FORMAT}. Received: {path}")
    return run


def _rounded(value):
    """Six significant digits: more would only make the committed files long."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
