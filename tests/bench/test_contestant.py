"""A provider's process: asleep unless asked, and its misfortunes told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsepconv.bench import contestant, data, machine
from fastsepconv.bench.contestant import Contestant, ContestantError
from fastsepconv.bench.problems import Layer, to_dict

LAYER = Layer("tutorial", 3, 4, 5, bias=True)
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, which only Linux has")


@pytest.fixture
def process():
    started = Contestant("reference", threads=1)
    yield started
    started.close()


def state(process) -> str:
    return Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@needs_proc
def test_a_process_is_stopped_between_two_orders(process):
    process.ask("hello")
    assert state(process) == "T"
    process.ask("forget")
    assert state(process) == "T"


@needs_proc
def test_the_time_that_a_process_used_is_counted(process):
    process.ask("hello")
    assert 0 < process.cpu_seconds <= machine.busy_seconds()


def test_each_call_is_timed_and_each_weight_set_has_its_turn(process, tmp_path):
    data.write(LAYER, tmp_path)
    process.ask("hello")
    prepared = process.ask("prepare", problem=to_dict(LAYER), folder=str(tmp_path), results=str(tmp_path / "results"))
    assert prepared["first_call_seconds"] > 0
    assert data.load(tmp_path / "results" / "first")["y"].shape == (1, 3, 3, 5)
    times = process.ask("block", seconds=0.0, calls=7, warm_seconds=0.0)["times"]
    assert len(times) == 7 and min(times) > 0


def test_an_error_in_the_process_comes_back_with_its_words(process):
    with pytest.raises(ContestantError, match="FileNotFoundError: /nowhere/weights0"):
        process.ask("prepare", problem=to_dict(LAYER), folder="/nowhere", results="/nowhere")
    assert "versions" in process.ask("hello"), "the process should have survived"


def test_the_end_of_a_process_is_told(process):
    process.ask("hello")
    process._process.kill()
    with pytest.raises(ContestantError, match="its process ended"):
        process.ask("hello")


def test_a_library_that_is_not_there_makes_its_provider_absent(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("FASTSEPCONV_BENCH_TORCH_PYTHON", raising=False)
    started = Contestant("torch", threads=1)
    try:
        assert started.ask("hello")["absent"].startswith("no torch here")
    finally:
        started.close()


def test_a_provider_may_have_an_interpreter_of_its_own(monkeypatch):
    monkeypatch.setenv("FASTSEPCONV_BENCH_TORCH_PYTHON", "/opt/torch/bin/python")
    assert contestant.interpreter_for("torch") == "/opt/torch/bin/python"
    assert contestant.interpreter_for("tensorflow") == sys.executable


@needs_proc
def test_a_stopped_process_does_not_outlive_a_race_that_is_killed():
    code = (
        "import time; from fastsepconv.bench.contestant import Contestant\n"
        "one = Contestant('reference', 1); one.ask('hello'); print(one._process.pid, flush=True); time.sleep(60)"
    )
    race = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    stopped = int(race.stdout.readline())
    race.kill()
    race.communicate()
    deadline = time.monotonic() + 10
    while machine.process_seconds(stopped) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert machine.process_seconds(stopped) == 0, "the provider's process is still there"
