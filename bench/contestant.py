"""The race's side of a provider's process: start it, give it an order, stop it while it has none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from . import machine
from .providers import PROVIDERS

# Loads this folder as a package by its path: the provider's interpreter need not have fastsepconv installed.
_BOOTSTRAP = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastsepconv_bench", sys.argv[1] + "/__init__.py")
package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from fastsepconv_bench.worker import serve
serve(sys.argv[2], int(sys.argv[3]))
"""
_CAN_STOP = hasattr(signal, "SIGSTOP")


class ContestantError(RuntimeError):
    """The provider's process failed or died; the message carries its own words."""


class Contestant:
    """A provider in a process of its own, asleep except while it answers `ask`."""

    def __init__(self, label: str, threads: int, interpreter: str | None = None):
        self.label = label
        self.provider = label.split("#")[0]
        self.threads = threads
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [interpreter or interpreter_for(self.provider), "-c", _BOOTSTRAP, str(Path(__file__).parent)]
        self._process = subprocess.Popen(
            [*command, self.provider, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=tempfile.gettempdir(),  # an interpreter run with -c imports from where it stands
            env=_environment(threads),
        )
        self._stopped = False

    def ask(self, do: str, **arguments) -> dict:
        """Wake the process, have one order done, stop it again; the answer."""
        self._continue()
        line = self._converse(json.dumps({"do": do, **arguments}) + "\n")
        if not line:
            raise ContestantError(f"{self.label}: its process ended, code {self._process.wait()}\n{self._last_words()}")
        self._stop()
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(f"{self.label}: {answer['error']}")
        return answer

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the process has used."""
        return machine.process_seconds(self._process.pid)

    def close(self) -> None:
        self._process.kill()  # a stopped process can be killed, though not asked to end
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream:
                with contextlib.suppress(BrokenPipeError):  # an order that was never read
                    stream.close()

    def _converse(self, order: str) -> str:
        """Send a line and await one; empty where the process has ended."""
        orders, replies = self._process.stdin, self._process.stdout
        if not orders or not replies:
            return ""
        try:
            orders.write(order.encode())
            orders.flush()
        except BrokenPipeError:
            return ""
        return replies.readline().decode()

    def _stop(self) -> None:
        if _CAN_STOP:
            os.kill(self._process.pid, signal.SIGSTOP)
            _, status = os.waitpid(self._process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                raise ContestantError(f"{self.label}: its process ended\n{self._last_words()}")
            self._stopped = True

    def _continue(self) -> None:
        if self._stopped:
            os.kill(self._process.pid, signal.SIGCONT)
            self._stopped = False

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]


def interpreter_for(provider: str) -> str:
    """The Python that runs a provider: FASTSEPCONV_BENCH_<LIBRARY>_PYTHON, or this one."""
    library = PROVIDERS[provider].library.upper()
    return os.environ.get(f"FASTSEPCONV_BENCH_{library}_PYTHON") or sys.executable


def _environment(threads: int) -> dict[str, str]:
    """Every library's own word for the number of threads; nothing else is changed, a peer runs as it comes."""
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "FASTSEPCONV_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
    return os.environ | quiet | dict.fromkeys(names, str(threads))
