"""`fastsepconv bench`: this package raced against TensorFlow and the other runtimes that are installed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastsepconv.bench.problems import (
    BACKWARD,
    BFLOAT16,
    FLOAT32,
    FORWARD,
    NETWORKS,
    SHAPES,
    Problem,
    layers,
    networks,
)
from fastsepconv.bench.providers import RACERS, takes
from fastsepconv.cli.console import (
    BAD_FILE,
    CHECK_FAILED,
    NOT_INSTALLED,
    OK,
    USAGE,
    CommandError,
    add_command,
    count,
    positive,
)

DESCRIPTION = """Race this package against TensorFlow, PyTorch, ONNX Runtime and OpenVINO, as far as they are
installed. Each provider has a process of its own; they run in alternating blocks, all others stopped. Each one's
outputs and gradients are held against a float64 reference before it is timed. The times are medians with
quartiles; "1.30x" says that a provider takes 1.30 times as long as this package; below 1 is a loss. Results that
are not comparable (NumPy arrays instead of an op in a graph) stand apart.

A provider may live in an environment of its own: FASTSEPCONV_BENCH_TORCH_PYTHON=/path/to/python (likewise
ONNXRUNTIME, OPENVINO, TENSORFLOW)."""

EXAMPLES = (
    "fastsepconv bench",
    "fastsepconv bench --problems tutorial --batch 64 --pass forward backward",
    "fastsepconv bench --only 19x19x728 --providers fastsepconv tensorflow torch",
    "fastsepconv bench --dtype bfloat16",
    "fastsepconv bench --network xception --save run.json",
    "fastsepconv bench --check --save check.json",
    "python -m fastsepconv.bench.report run.json check.json",
)

SECONDS_TO_PREPARE = 2  # a problem, with its references and graphs

EXITS = {
    OK: "raced, whoever won",
    CHECK_FAILED: "a provider gave wrong results or fell over, or (--check) the instrument is off",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    command = add_command(subparsers, "bench", "race against other runtimes", DESCRIPTION, EXAMPLES, EXITS)
    command.add_argument(
        "--problems", nargs="+", choices=list(SHAPES), metavar="SUITE", help=f"single layers: {', '.join(SHAPES)}"
    )
    command.add_argument(
        "--network", nargs="+", choices=list(NETWORKS), metavar="NAME", help=f"whole networks: {', '.join(NETWORKS)}"
    )
    command.add_argument("--batch", type=count(1), nargs="+", metavar="N", help="batch sizes (default: each suite's)")
    command.add_argument(
        "--pass",
        dest="modes",
        nargs="+",
        choices=(FORWARD, BACKWARD),
        metavar="PASS",
        help="forward, backward (forward and every gradient; a network's train step) (default: forward for layers, "
        "both for networks)",
    )
    command.add_argument(
        "--dtype",
        choices=(FLOAT32, BFLOAT16),
        default=FLOAT32,
        help="of the layers (default: float32); whole networks are float32",
    )
    command.add_argument("--only", metavar="TEXT", help="keep the problems whose name holds TEXT; see --list")
    command.add_argument(
        "--providers",
        nargs="+",
        default=RACERS,
        type=_provider,
        metavar="NAME",
        help=f"of {', '.join(RACERS)} (default: all)",
    )
    command.add_argument("--threads", type=count(1), metavar="N", help="for every provider (default: all cores)")
    command.add_argument(
        "--seconds", type=positive, metavar="S", default=1.0, help="timed for each provider and problem (default: 1)"
    )
    command.add_argument("--rounds", type=count(2), metavar="N", default=8, help="alternating blocks (default: 8)")
    command.add_argument("--save", type=Path, metavar="FILE", help="save what was found, for the report")
    command.add_argument("--list", action="store_true", help="list the problems that would be raced, and stop")
    command.add_argument("--check", action="store_true", help="check the instrument instead: TensorFlow against itself")


def run(args: argparse.Namespace) -> int:
    """Race; returns the exit code."""
    problems = selected(args)
    if args.list:
        names = [problem.name for problem in problems]
        print(json.dumps({"problems": names}, indent=2) if args.json else "\n".join(names))
        return OK
    if args.network and args.dtype != FLOAT32:
        raise CommandError(f"Expected layers alone, or --dtype {FLOAT32}. Received: --network", USAGE)
    if not problems:
        raise CommandError("Expected at least one problem. Received: a selection that leaves none (see --list)", USAGE)
    if args.save and not args.save.parent.is_dir():
        raise CommandError(f"Expected a file in a folder that exists. Received: --save {args.save}", USAGE)
    from fastsepconv.bench.contestant import ContestantError

    try:
        return _check(args) if args.check else _race(args, problems)
    except ContestantError as error:
        raise CommandError(str(error), NOT_INSTALLED) from error


def selected(args: argparse.Namespace) -> list[Problem]:
    """The problems that the command line names, in the order of the report."""
    suites = args.problems or ([] if args.network else ["xception"])
    found: list[Problem] = []
    for suite in suites:
        found += layers(suite, args.batch, args.modes or [FORWARD], args.dtype)
    for name in args.network or []:
        found += networks(name, args.batch, args.modes)
    return [problem for problem in found if not args.only or args.only in problem.name]


def _race(args: argparse.Namespace, problems: list[Problem]) -> int:
    from fastsepconv.bench import machine, report, results
    from fastsepconv.bench.race import Arena, Budget

    threads = args.threads or machine.available_cores()
    say = _printer(args.json)
    peak, copying = machine.peak(threads, args.dtype), machine.copying(threads)
    providers = [name for name in args.providers if any(takes(name.split("#")[0], problem) for problem in problems)]
    with Arena(providers, threads, Budget(args.seconds, args.rounds), args.seed) as arena:
        document = results.begin(arena, peak, copying, args.dtype)
        rates = f"peak {peak[str(threads)]:.0f} GFLOP/s, copy {copying[str(threads)]:.0f} GB/s"
        say(f"{document['machine']['cpu']}, {threads} threads, {rates}")
        minutes = len(problems) * (SECONDS_TO_PREPARE + 1.3 * len(arena.versions) * args.seconds) / 60
        say(f"{len(problems)} problems, about {max(1, round(minutes))} min")
        for label, reason in arena.absent.items():
            say(f"{label} is absent: {reason}")
        for problem in problems:
            raced = arena.race(problem)
            document["problems"].append(results.record(problem, arena, raced, document["baseline"]))
            for line in report.problem_lines(document["problems"][-1], document):
                say(line)
    document["peak_gflops"] = machine.higher(peak, machine.peak(threads, args.dtype))
    document["copy_gbytes"] = machine.higher(copying, machine.copying(threads))
    for line in ["", *report.summary_lines(document)]:
        say(line)
    _deliver(args, document)
    statuses = {entry["status"] for record in document["problems"] for entry in record["providers"].values()}
    return CHECK_FAILED if statuses & {"wrong", "failed"} else OK


def _check(args: argparse.Namespace) -> int:
    from fastsepconv.bench import instrument, machine, results
    from fastsepconv.bench.race import Budget

    provider, rivals = "tensorflow", [name for name in args.providers if name in ("fastsepconv", "torch")]
    budget = Budget(args.seconds, args.rounds)
    threads = args.threads or machine.available_cores()
    checks = instrument.check(provider, rivals, threads, budget, _printer(args.json))
    _deliver(args, results.checked(checks, threads, budget))
    return OK if all(check.passed for check in checks) else CHECK_FAILED


def _deliver(args: argparse.Namespace, document: dict) -> None:
    from fastsepconv.bench import results

    if args.save:
        try:
            results.save(document, args.save)
        except OSError as error:
            raise CommandError(f"{args.save}: {error.strerror}", BAD_FILE) from error
    if args.json:
        print(json.dumps(document, indent=2))


def _printer(json_only: bool):
    """What people read goes to stdout, or to stderr where stdout belongs to the JSON document."""
    stream = sys.stderr if json_only else sys.stdout
    return lambda line: print(line, file=stream, flush=True)


def _provider(text: str) -> str:
    """An argparse type: a provider, or "provider#something" for a second copy of it."""
    if text.split("#")[0] not in RACERS:
        raise argparse.ArgumentTypeError(f"Expected one of {', '.join(RACERS)}. Received: {text}")
    return text
