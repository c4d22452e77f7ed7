"""The CUDA kernels raced against cuDNN, cuBLAS and torch.compile, and whole networks, on the card that is here.

`python -m fastsepconv.bench.cuda [--quick] [--seconds S] [--only TEXT] [--tier plain] [--folder DIR]`

Before its times count, each provider's results are held against float64; whoever computes something else is not timed.
Times are those of CUDA graphs' replays, networks' those of calls, by events, providers in turns. The run is saved as
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastsepconv.kernels import nvidia

from . import cuda_report, stats
from .cuda_problems import CudaNetwork, CudaProblem, problems

RESULTS = Path(__file__).with_name("results")
FORMAT = 1
# Exit codes, those of the command line: done, a check has failed, something that is needed is missing.
OK, CHECK_FAILED, MISSING = 0, 1, 4
SECONDS, QUICK_SECONDS = 420.0, 150.0
ROUNDS, SECONDS_A_PROBLEM, QUICK_SECONDS_A_PROBLEM = 5, 0.8, 0.3
NETWORK_SHARE = 8  # times as long as a layer
# Largest error over largest true value. Long sums of products cost float32 1e-5 on every card; TF32 has 11 bits of each
# factor, bfloat16 8 of each result.
BOUNDS = {"float32": 5e-5, "tf32": 4e-3, "bfloat16": 2e-2}


def main(arguments: list[str] | None = None) -> int:
    """Race, print, save; returns the exit code."""
    args = _parser().parse_args(arguments)
    missing = obstacle()
    if missing:
        print(f"The CUDA kernels cannot be raced here: {missing}.", file=sys.stderr)
        return MISSING
    if args.tier:
        os.environ["FASTSEPCONV_CUDA_TIER"] = args.tier
    chosen = [problem for problem in problems(args.quick) if args.only in problem.name]
    run = begin()
    if run["no_networks"]:
        chosen = [problem for problem in chosen if problem.op != "network"]
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    each = QUICK_SECONDS_A_PROBLEM if args.quick else SECONDS_A_PROBLEM
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / f"cuda-{_slug(run['card'])}.json"

    def tell(record: dict) -> None:
        _say(cuda_report.problem_line(record, run["ceilings"]))
        file.write_text(json.dumps(run, indent=1) + "\n")  # each time: a run that is cut off tells what it knows

    try:
        race_all(run, chosen, seconds, lambda problem: race_one(problem, each), tell)
    except KeyboardInterrupt:
        _say("Interrupted.")  # and what is known is told
        run["interrupted"] = True
    file.write_text(json.dumps(run, indent=1) + "\n")
    _say(f"\n{cuda_report.markdown(run)}\nSaved as {file}")
    return OK if _all_is_right(run) else CHECK_FAILED


def obstacle() -> str | None:
    """Why nothing can be raced here; None: it can."""
    if nvidia.is_simulated():
        return "the simulator is no card"
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    missing = nvidia.obstacle()
    if missing is None and not torch.cuda.is_available():
        return "PyTorch sees no card"
    return missing


def begin() -> dict[str, Any]:
    """A run without problems yet: the card, what it reaches, the versions."""
    import torch

    from . import cuda_networks, cuda_timing

    driver, _ = nvidia.look()
    names = ("torch", "keras", "numba", "numba-cuda", "fastsepconv")
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": torch.cuda.get_device_name(0),
        "driver": driver,
        "tier": os.environ.get("FASTSEPCONV_CUDA_TIER", "plain"),
        "versions": {name: _version(name) for name in names} | {"cuDNN": str(torch.backends.cudnn.version())},
        "ceilings": cuda_timing.ceilings(),
        "problems": [],
        "left_out": [],
        "no_networks": cuda_networks.obstacle(),
    }


def race_all(
    run: dict,
    chosen: Sequence[CudaProblem | CudaNetwork],
    seconds: float,
    one: Callable[[Any], dict],
    tell: Callable[[dict], None],
) -> None:
    """Race the problems into the run one by one, until the time is over, or nobody can compute any more because a
    kernel has left the card with an error. Which are left out so far is noted at each moment.
    """
    end, lost = time.monotonic() + seconds, False
    run["left_out"] += [problem.name for problem in chosen]
    for problem in chosen:
        if lost or time.monotonic() > end:
            break
        record = {**asdict(problem), "name": problem.name, "group": problem.group}
        record |= {"flops": problem.flops, "least_bytes": problem.least_bytes, "providers": one(problem)}
        run["problems"].append(record)
        run["left_out"].remove(problem.name)
        failed = all(entry["status"] == "failed" for entry in record["providers"].values())
        lost = failed and problem.op != "network"  # that may lack memory; if it is the card, the next one shows it
        tell(record)


def race_one(problem: CudaProblem | CudaNetwork, seconds: float) -> dict[str, dict]:
    """What each provider of a layer or of a network did."""
    import torch

    from . import cuda_networks

    torch.cuda.empty_cache()
    if isinstance(problem, CudaNetwork):
        return cuda_networks.race(problem, NETWORK_SHARE * seconds)
    return race(problem, seconds)


def race(problem: CudaProblem, seconds: float) -> dict[str, dict]:
    """What each provider did: "timed", "wrong" or "failed", with times, the error, and the ratio to ours."""
    import torch

    from . import cuda_providers as who
    from . import cuda_timing

    with who.numeric_switch(problem.numbers), torch.no_grad():
        first = who.tensors(problem, "cuda", 0)
        size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
        count = cuda_timing.set_count(size, cuda_timing.cache_bytes())
        sets = [first, *(who.tensors(problem, "cuda", seed) for seed in range(1, count))]
        steps = who.providers(problem)
        entries = judged(problem, steps, first, who.truth(problem, first))
        replays: dict[str, cuda_timing.Replay] = {}
        for name, entry in entries.items():
            if entry["status"] == "right":
                try:
                    replays[name] = cuda_timing.Replay(steps[name], sets)
                except RuntimeError as error:
                    entry |= {"status": "failed", "reason": f"it cannot be captured: {cuda_report.one_line(error)}"}
        times = cuda_timing.race(replays, ROUNDS, seconds) if replays else {}
    return timed(entries, times)


def judged(problem: CudaProblem, steps: dict, inputs: Any, true: list) -> dict[str, dict]:
    """The gate: whether each provider is "right", "wrong" or "failed", and how long its first call took the host."""
    entries: dict[str, dict] = {}
    for name, step in steps.items():
        began = time.monotonic()
        try:
            results = step(inputs)
            first_call = time.monotonic() - began
            error = max(_error(result, exact) for result, exact in zip(results, true, strict=True))
        except Exception as failure:  # of whatever kind: the others are raced all the same
            entries[name] = {"status": "failed", "reason": cuda_report.one_line(failure)}
            continue
        entry = {"status": "right", "largest_error": error, "first_call_seconds": first_call}
        if not error <= BOUNDS[problem.numbers]:
            entry |= {"status": "wrong", "reason": f"off by {error:.1e}, more than {BOUNDS[problem.numbers]:.0e}"}
        entries[name] = entry
    return entries


def timed(entries: dict[str, dict], times: dict[str, stats.Rounds]) -> dict[str, dict]:
    """The entries with their times, and the others' times over ours."""
    for name, rounds in times.items():
        entries[name] |= {"status": "timed", "seconds": stats.summary(rounds)}
        if name != cuda_report.OURS and cuda_report.OURS in times:
            entries[name]["ratio"] = stats.ratio(times[cuda_report.OURS], rounds)
    return entries


def _error(result, exact) -> float:
    if result.shape != exact.shape or not bool(result.isfinite().all()):
        return float("inf")
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _all_is_right(run: dict) -> bool:
    """Whether nobody computed anything wrong, ours was timed each time, and the race came to its end."""
    wrong = any(entry["status"] == "wrong" for record in run["problems"] for entry in record["providers"].values())
    failed = any(record["providers"][cuda_report.OURS]["status"] != "timed" for record in run["problems"])
    return not (wrong or failed or run.get("interrupted"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m fastsepconv.bench.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, nearly all of batch 32, within 3 minutes")
    parser.add_argument("--seconds", type=float, help="no problem is begun after this many seconds")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose names contain TEXT")
    parser.add_argument("--tier", choices=("plain", "fast"), help="default: what FASTSEPCONV_CUDA_TIER says")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", default=RESULTS, help="for cuda-CARD.json (bench/results)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
