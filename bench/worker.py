"""A provider's own process: it takes orders, one JSON object a line, and answers each with one line.

Started by `contestant.Contestant`, in the provider's interpreter, which needs nothing but NumPy and the provider's
library. Between two orders the process is stopped (SIGSTOP), so none of its threads can spin.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

from . import data, problems
from .providers import PROVIDERS, Unsupported


class Worker:
    def __init__(self, provider: str, threads: int):
        entry = PROVIDERS[provider]
        start = time.perf_counter()
        module = importlib.import_module(f".providers.{entry.module}", __package__)
        self.provider = module.Provider(threads, **entry.options)
        self.import_seconds = time.perf_counter() - start
        self.steps: list = []
        self.turn = itertools.count()

    def hello(self) -> dict:
        return {"versions": self.provider.versions, "import_seconds": self.import_seconds}

    def prepare(self, problem: dict, folder: str, results: str) -> dict:
        """Build the steps, run each once, and leave what the first and the last give in `results`/first and /last."""
        self.forget()
        built = problems.from_dict(problem)
        start = time.perf_counter()
        self.steps, read = self.provider.prepare(built, Path(folder))
        first = self.steps[0]()
        first_call_seconds = time.perf_counter() - start
        for step in self.steps[1:-1]:
            step()
        last = self.steps[-1]() if len(self.steps) > 1 else first
        Path(results).mkdir()
        data.save(Path(results) / "first", read(first))
        data.save(Path(results) / "last", read(last))
        return {"first_call_seconds": first_call_seconds, "sets": len(self.steps)}

    def block(self, seconds: float, calls: int, warm_seconds: float) -> dict:
        """Time each call by itself for `seconds`, at least `calls` of them, after `warm_seconds` that do not count."""
        clock = time.perf_counter
        times: list[float] = []
        gc.disable()
        until = clock() + warm_seconds
        self._step()
        while clock() < until:
            self._step()
        until = clock() + seconds
        while clock() < until or len(times) < calls:
            step = self.steps[next(self.turn) % len(self.steps)]
            start = clock()
            outputs = step()
            times.append(clock() - start)
            del outputs
        gc.enable()
        return {"times": times}

    def forget(self) -> dict:
        """Let go of the problem's arrays and graphs."""
        self.steps = []
        gc.collect()
        return {}

    def _step(self) -> None:
        self.steps[next(self.turn) % len(self.steps)]()


def serve(provider: str, threads: int) -> None:
    """Answer orders until standard input ends. What a library prints goes to standard error."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if worker is None:
                worker = Worker(provider, threads)
            reply = getattr(worker, order.pop("do"))(**order)
        except ImportError as error:
            reply = {"absent": f"{error} (in {sys.executable})"}
        except Unsupported as error:
            reply = {"unsupported": str(error)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _die_with_parent() -> None:
    """A stopped process would outlive a parent that was killed; Linux can end it with the parent."""
    if sys.platform == "linux":
        import ctypes
        import signal

        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
