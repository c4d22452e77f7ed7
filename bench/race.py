"""The race: every provider of a problem in its own process, in alternating blocks, all others stopped."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import data, gate, machine
from .contestant import Contestant, ContestantError
from .problems import Network, Problem, to_dict
from .providers import takes
from .stats import Rounds

REFERENCE = "reference"
DISTURBED = 0.03  # a share of the machine used by others above which a problem is timed once more, and then marked


@dataclass(frozen=True)
class Budget:
    """How long one provider is timed on one problem: `rounds` blocks of `seconds / rounds`, each warmed up first."""

    seconds: float = 1.0
    rounds: int = 8
    calls: int = 2  # at least, in a block
    warm_seconds: float = 0.03


@dataclass
class Result:
    """`status`: "timed", "absent", "unsupported", "failed", "wrong" (refused at the gate)."""

    provider: str
    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    first_call_seconds: float = 0.0
    rounds: Rounds = field(default_factory=list)


class _OthersClock:
    """What share of the machine others have used since it was made: a race beside a busy process means nothing."""

    def __init__(self, contestants: Iterable[Contestant]):
        self._contestants = list(contestants)
        self._start, self._others = time.monotonic(), self._others_seconds()

    def share(self) -> float:
        wall = time.monotonic() - self._start
        return max(0.0, self._others_seconds() - self._others) / max(wall, 0.01) / (os.cpu_count() or 1)

    def _others_seconds(self) -> float:
        own = machine.process_seconds(os.getpid()) + sum(one.cpu_seconds for one in self._contestants)
        return machine.busy_seconds() - own


class Arena:
    """The providers' processes, started once and kept for many problems. Use it in a `with`.

    A label is a provider's name, or that and `#` and something: the same provider twice is the same race twice.
    """

    def __init__(self, labels: Iterable[str], threads: int, budget: Budget, seed: int = 0):
        self.labels = list(labels)
        self.threads, self.budget, self.seed = threads, budget, seed
        self.versions: dict[str, dict[str, str]] = {}
        self.absent: dict[str, str] = {}
        self.flops, self.disturbance = 0, 0.0
        self._processes: dict[str, Contestant] = {}

    def __enter__(self) -> Arena:
        try:
            for label in [REFERENCE, *self.labels]:
                self._start(label)
        except BaseException:
            self.__exit__()
            raise
        if REFERENCE in self.absent:
            raise ContestantError(f"The reference cannot run: {self.absent[REFERENCE]}")
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def race(self, problem: Problem, labels: Iterable[str] | None = None) -> list[Result]:
        """Gate, then time, every provider that has such problems (or those of `labels`), in the order of the arena.

        Leaves `flops`, the problem's operations, and `disturbance`, the share of the machine that others used;
        a disturbed race is run once more.
        """
        with tempfile.TemporaryDirectory(prefix="fastsepconv-bench-") as name:
            folder = Path(name)
            data.write(problem, folder, self.seed)
            self._prepare(REFERENCE, problem, folder)
            wanted = self.labels if labels is None else labels
            entered = [label for label in self.labels if label in wanted and takes(label.split("#")[0], problem)]
            results = [self._enter(label, problem, folder) for label in entered]
            self.flops = problem.flops if not isinstance(problem, Network) else int((folder / "flops").read_text())
        self.disturbance = self._time(results)
        if self.disturbance > DISTURBED:
            self.disturbance = self._time(results)
        for process in self._processes.values():
            process.ask("forget")
        return results

    def _time(self, results: list[Result]) -> float:
        """Fill in the rounds of those that passed the gate; the share of the machine that others used meanwhile."""
        timed = [result for result in results if result.status == "timed"]
        for result in timed:
            result.rounds.clear()
        others = _OthersClock(self._processes.values())
        for index in range(self.budget.rounds):
            for result in timed if index % 2 == 0 else reversed(timed):
                self._run_block(result)
        return others.share()

    def _start(self, label: str) -> None:
        if label in self._processes:
            return
        try:
            process = self._processes[label] = Contestant(label, self.threads)
            answer = process.ask("hello")
        except (OSError, ContestantError) as error:
            answer = {"absent": f"it does not start: {error}"}
        if "absent" not in answer:
            self.versions[label] = answer["versions"]
            return
        self.absent[label] = answer["absent"]
        if label in self._processes:
            self._processes.pop(label).close()

    def _prepare(self, label: str, problem: Problem, folder: Path) -> dict:
        arguments = {"problem": to_dict(problem), "folder": str(folder), "results": str(folder / label)}
        return self._processes[label].ask("prepare", **arguments)

    def _enter(self, label: str, problem: Problem, folder: Path) -> Result:
        """Have a provider build the problem, and check what it computes."""
        if label in self.absent:
            return Result(label, "absent", self.absent[label])
        try:
            answer = self._prepare(label, problem, folder)
        except ContestantError as error:
            return self._failed(label, error)
        if "unsupported" in answer:
            return Result(label, "unsupported", answer["unsupported"])
        errors, wrong = gate.check(problem, folder / REFERENCE, folder / label)
        result = Result(label, "timed", "", errors, answer["first_call_seconds"])
        if wrong:
            result.status, result.reason = "wrong", wrong
        return result

    def _run_block(self, result: Result) -> None:
        if result.status != "timed":
            return
        budget = self.budget
        limits = {"seconds": budget.seconds / budget.rounds, "calls": budget.calls, "warm_seconds": budget.warm_seconds}
        try:
            result.rounds.append(self._processes[result.provider].ask("block", **limits)["times"])
        except ContestantError as error:
            failed = self._failed(result.provider, error)
            result.status, result.reason = failed.status, failed.reason

    def _failed(self, label: str, error: ContestantError) -> Result:
        """A provider that fell over is started anew for the next problem."""
        self._processes.pop(label).close()
        self._start(label)
        return Result(label, "failed", str(error))
