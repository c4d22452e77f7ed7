"""The race: who is let in, in which order they run, and that every installed provider computes the right thing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastsepconv.bench import instrument, race
from fastsepconv.bench.problems import BACKWARD, FORWARD, Layer
from fastsepconv.bench.providers import RACERS, Unsupported, reference, takes
from fastsepconv.bench.race import Arena, Budget
from fastsepconv.bench.worker import Worker

QUICK = Budget(seconds=0.0, rounds=2, calls=1, warm_seconds=0.0)
LAYER = Layer("tutorial", 3, 4, 5, bias=True, weight_sets=2)
orders: list[tuple[str, str]] = []


class Right(reference.Provider):
    """Computes what the reference computes."""


class Wrong(reference.Provider):
    """Adds a little to everything of the last weight set only, as a stale cache would."""

    def prepare(self, problem, folder):
        steps, read = super().prepare(problem, folder)
        last = steps[-1]
        return [*steps[:-1], lambda: tuple(value + 0.01 for value in last())], read


class Picky(reference.Provider):
    def prepare(self, problem, folder):
        raise Unsupported("not today")


CLASSES = {"reference": Right, "fastsepconv": Right, "tensorflow": Wrong, "torch": Picky}


class InThisProcess:
    """A contestant without a process of its own, whose provider is one of the classes above."""

    def __init__(self, label, threads):
        self.label, self.cpu_seconds = label, 0.0
        self.worker = Worker.__new__(Worker)
        self.worker.provider = CLASSES[label.split("#")[0]](threads)
        self.worker.import_seconds, self.worker.turn, self.worker.steps = 0.0, iter(range(1000)), []

    def ask(self, do, **arguments):
        orders.append((self.label, do))
        try:
            return getattr(self.worker, do)(**arguments)
        except Unsupported as error:
            return {"unsupported": str(error)}

    def close(self):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    orders.clear()
    monkeypatch.setattr(race, "Contestant", InThisProcess)
    monkeypatch.setattr(race, "_OthersClock", lambda contestants: SimpleNamespace(share=lambda: 0.0))
    monkeypatch.setattr(instrument, "PROBLEMS", [LAYER])


def test_a_wrong_provider_is_refused_and_not_timed(in_this_process):
    with Arena(["fastsepconv", "tensorflow"], 1, QUICK) as arena:
        right, wrong = arena.race(LAYER)
    assert right.status == "timed" and len(right.rounds) == 2
    assert wrong.status == "wrong" and wrong.rounds == []
    assert "the error of y is" in wrong.reason
    assert ("tensorflow", "block") not in orders


def test_an_unsupported_problem_is_told(in_this_process):
    with Arena(["torch"], 1, QUICK) as arena:
        (result,) = arena.race(LAYER)
    assert (result.status, result.reason) == ("unsupported", "not today")


def test_blocks_alternate_and_the_order_turns_round(in_this_process):
    with Arena(["fastsepconv", "fastsepconv#2"], 1, QUICK) as arena:
        arena.race(LAYER)
    blocks = [label for label, do in orders if do == "block"]
    assert blocks == ["fastsepconv", "fastsepconv#2", "fastsepconv#2", "fastsepconv"]


def test_a_disturbed_race_is_run_once_more_and_marked(in_this_process, monkeypatch):
    monkeypatch.setattr(race, "_OthersClock", lambda contestants: SimpleNamespace(share=lambda: 0.5))
    with Arena(["fastsepconv"], 1, QUICK) as arena:
        (result,) = arena.race(LAYER)
    assert [do for _, do in orders].count("block") == 4
    assert len(result.rounds) == 2 and arena.disturbance == 0.5


def test_the_instrument_sees_a_slower_copy_and_a_slower_race(in_this_process, monkeypatch):
    """A block takes what is told here, whatever it takes; alone is the process that another module starts."""
    took = {"fastsepconv": 1.25, "fastsepconv#2": 1.375}

    class Told(InThisProcess):
        def ask(self, do, **arguments):
            answer = super().ask(do, **arguments)
            return {"times": [took[self.label]] * 3} if do == "block" and self.label in took else answer

    class Alone(Told):
        def ask(self, do, **arguments):
            answer = super().ask(do, **arguments)
            return {"times": [1.0] * 3} if do == "block" else answer

    monkeypatch.setattr(race, "Contestant", Told)
    monkeypatch.setattr(instrument, "Contestant", Alone)
    told = []
    checks = instrument.check("fastsepconv", ["torch"], 1, QUICK, told.append)
    assert checks == told
    assert [(check.ratio, check.passed) for check in checks] == [(1.1, False), (1.25, False)]


@pytest.fixture(scope="module")
def arena():
    with Arena(RACERS, threads=2, budget=QUICK) as started:
        yield started


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize("op", ["separable", "depthwise", "pointwise"])
def test_every_installed_provider_passes_the_gate(arena, op, mode):
    filters = 8 if op == "depthwise" else 12
    layer = Layer("xception", 5, 8, filters, batch=2, mode=mode, op=op, bias=op == "separable", weight_sets=2)
    assert_all_pass(arena, layer)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        (7, {"taps": 5}),
        (7, {"strides": 2}),
        (8, {"strides": 2}),  # one zero more behind the image than before it
        (8, {"taps": 5, "strides": 2}),
        (7, {"dilation": 2}),
    ],
)
def test_every_installed_provider_has_every_geometry(arena, size, window, mode):
    assert_all_pass(arena, Layer("depthwise", size, 8, 8, batch=2, mode=mode, op="depthwise", **window))


def test_separable_layers_have_it_too(arena):
    assert_all_pass(arena, Layer("xception", 8, 8, 12, mode=BACKWARD, taps=5, strides=2))


def assert_all_pass(arena, layer):
    """Every provider that has such layers is timed, unless it is not installed."""
    results = {result.provider: result for result in arena.race(layer)}
    assert list(results) == [name for name in RACERS if takes(name, layer)]
    for name in ("fastsepconv", "fastsepconv-arrays", "tensorflow"):
        assert results[name].status == "timed", results[name].reason
    for name, result in results.items():
        assert result.status == "timed" or name in arena.absent or "onnx" in result.reason, result.reason
        assert result.status != "timed" or set(result.errors) == set(layer.outputs)
