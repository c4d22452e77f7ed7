"""Who is raced on a card, on the CPU: every provider computes the same, and whoever does not is found out."""

from __future__ import annotations

import json
import os
import sys

import pytest

from fastsepconv.bench import cuda
from fastsepconv.bench.cuda_problems import (
    BACKWARD,
    BOTH,
    FORWARD,
    NUMBERS,
    PREDICT,
    TRAIN,
    CudaNetwork,
    CudaProblem,
)
from fastsepconv.bench.cuda_report import OURS, STOCK

from .torch_cases import torch

from fastsepconv.bench import cuda_networks, cuda_providers, cuda_timing  # isort: skip  # they import PyTorch

CASES = [("separable", FORWARD), ("separable", BOTH), ("depthwise", FORWARD), ("depthwise", BACKWARD)]
CASES += [("pointwise", FORWARD)]


def small(op, mode, numbers="float32"):
    return CudaProblem(op, 7, 6, 6 if op == "depthwise" else 5, 2, mode, numbers)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize(("op", "mode"), CASES)
def test_all_providers_compute_the_same(op, mode, numbers):
    problem = small(op, mode, numbers)
    with cuda_providers.numeric_switch(numbers), torch.no_grad():
        a = cuda_providers.tensors(problem, "cpu", 0)
        steps = cuda_providers.providers(problem)
        entries = cuda.judged(problem, steps, a, cuda_providers.truth(problem, a))
    assert {name: e["status"] for name, e in entries.items()} == dict.fromkeys(steps, "right"), entries
    assert set(steps) >= {"fastsepconv", "cuBLAS" if op == "pointwise" else "cuDNN"} and len(steps) >= 2


def test_the_gradients_are_autograds():
    """The truth itself, tap by tap, against PyTorch's derivative of its own convolutions."""
    problem = small("separable", BOTH)
    a = cuda_providers.tensors(problem, "cpu", 0)
    x, depthwise, pointwise = (a[name].double().requires_grad_() for name in ("x", "depthwise", "pointwise"))
    mid = torch.conv2d(x.permute(0, 3, 1, 2), depthwise.permute(2, 3, 0, 1), padding=1, groups=6)
    y = mid.permute(0, 2, 3, 1) @ pointwise
    expected = [y, *torch.autograd.grad(y, [x, depthwise, pointwise], a["dy"].double())]
    for true, other in zip(cuda_providers.truth(problem, a), expected, strict=True):
        torch.testing.assert_close(true, other.detach())


def test_wrong_results_and_failures_are_found_out():
    problem = small("separable", BOTH)
    a = cuda_providers.tensors(problem, "cpu", 0)
    true = cuda_providers.truth(problem, a)
    right = [tensor.float() for tensor in true]

    def replaced(i, tensor):
        return lambda a: [*right[:i], tensor, *right[i + 1 :]]

    def fails(a):
        raise RuntimeError("an illegal memory access\nand more")

    steps = {
        "right": lambda a: right,
        "nan": replaced(1, right[1] * torch.nan),
        "off": replaced(3, right[3] * (1 + 1e-3)),
        "shape": replaced(0, right[0][:1]),
        "fails": fails,
        "lacks": lambda a: right[:2],
    }
    found = cuda.judged(problem, steps, a, true)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "right": "right", "nan": "wrong", "off": "wrong", "shape": "wrong", "fails": "failed", "lacks": "failed",
    }  # fmt: skip
    assert found["fails"]["reason"] == "RuntimeError: an illegal memory access"


def test_tf32_is_asked_of_everyone_and_taken_back(monkeypatch):
    monkeypatch.setenv("FASTSEPCONV_TF32", "0")
    before = torch.backends.cuda.matmul.allow_tf32
    with cuda_providers.numeric_switch("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.enabled and os.environ["FASTSEPCONV_TF32"] == "1"
    with cuda_providers.numeric_switch("bfloat16"):
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before and os.environ["FASTSEPCONV_TF32"] == "0"


def test_images_are_seen_in_channels_last_memory():
    a = cuda_providers.tensors(small("separable", BOTH), "cpu", 0)
    assert cuda_providers._first(a["x"]).is_contiguous(memory_format=torch.channels_last)
    assert a["grouped"].shape == (6, 1, 3, 3) and a["filters"].shape == (5, 6, 1, 1)
    for result in cuda_providers.cudnn(small("separable", BOTH))(a)[:2]:
        assert result.is_contiguous()


@pytest.mark.parametrize(("set_bytes", "count"), [(1, 8), (10, 8), (50, 3), (200, 2), (10**9, 2)])
def test_inputs_rotate_past_the_cache(set_bytes, count):
    assert cuda_timing.set_count(set_bytes, 50) == count


class Timed:
    """Stands for a graph's replays: runs the step on every set once, and times it by its order."""

    made = 0

    def __init__(self, step, sets):
        type(self).made += 1
        self.calls, self.place = len(sets), self.made
        self.results = [step(each) for each in sets]

    def seconds(self, replays):
        return [1e-4 * self.place] * replays


def test_a_whole_run_without_a_card(monkeypatch, tmp_path, capsys):
    problem, network = small("separable", BOTH), CudaNetwork(PREDICT, "float32", **NETWORK)
    make = cuda_providers.tensors
    Timed.made = TimedCalls.made = 0
    monkeypatch.setattr(cuda, "obstacle", lambda: None)
    monkeypatch.setattr(cuda, "problems", lambda quick: [problem, network])
    monkeypatch.setattr(cuda_timing, "Calls", TimedCalls)
    monkeypatch.setattr(cuda_providers, "tensors", lambda problem, device, seed: make(problem, "cpu", seed))
    monkeypatch.setattr(cuda_timing, "Replay", Timed)
    monkeypatch.setattr(cuda_timing, "cache_bytes", lambda: 2**10)
    monkeypatch.setattr(cuda_timing, "ceilings", lambda: dict.fromkeys(("copy", "float32", "tf32", "bfloat16"), 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Not a Card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "plain")
    file = tmp_path / "cuda-not-a-card.json"
    assert cuda.main(["--quick", "--folder", str(tmp_path)]) == cuda.OK
    run = json.loads(file.read_text())
    record, whole = run["problems"]
    assert record["providers"]["cuDNN"]["ratio"]["ratio"] == pytest.approx(2)
    assert whole["providers"][STOCK]["ratio"]["ratio"] == pytest.approx(0.5) and run["no_networks"] is None
    assert run["card"] == "Not a Card" and run["tier"] == "plain" and run["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert f"{problem.name} [" in said and "| separable forward+backward, float32, batch 2 |" in said

    monkeypatch.setattr(cuda, "BOUNDS", {"float32": 0.0})
    assert cuda.main(["--folder", str(tmp_path)]) == cuda.CHECK_FAILED
    wrong = len(record["providers"])  # every provider of the layer; the network is held to its own bound
    assert f"Not timed, {wrong}:" in capsys.readouterr().out
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    cuda.main(["--folder", str(tmp_path)])
    assert len(json.loads(file.read_text())["problems"]) == 1
    assert "No whole network was raced: Keras runs on jax" in capsys.readouterr().out


NETWORK = {"batch": 2, "size": 71}


@pytest.fixture
def models():
    """The network in stock layers and in ours, the same weights."""
    problem = CudaNetwork(TRAIN, "float32", **NETWORK)
    built = {label: cuda_networks.build(problem, "float32", ours=label == OURS) for label in (STOCK, OURS)}
    built[OURS].set_weights(built[STOCK].get_weights())
    return problem, built


class TimedCalls(cuda_timing.Calls):
    """Calls the step once, and times it by its order."""

    made = 0

    def __init__(self, step):
        type(self).made += 1
        self.place, self.host, self.results = self.made, [0.5], step()

    def seconds(self, replays):
        return [1e-4 * self.place] * replays


@pytest.mark.parametrize("mode", [PREDICT, TRAIN])
@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
def test_a_whole_network_is_raced(monkeypatch, mode, numbers):
    monkeypatch.setattr(cuda_timing, "Calls", TimedCalls)
    TimedCalls.made = 0
    entries = cuda_networks.race(CudaNetwork(mode, numbers, **NETWORK), 1.0)
    assert [*entries] == [OURS, STOCK]
    assert all(e["status"] == "timed" and e["host_seconds"] == 0.5 for e in entries.values()), entries
    assert all(0 < e["largest_error"] < cuda_networks.SANE[numbers] for e in entries.values()), entries
    assert entries[STOCK]["ratio"]["ratio"] == pytest.approx(0.5) and "ratio" not in entries[OURS]


def test_networks_are_of_the_layers_they_are_called_by_and_compute_in_their_numbers():
    import keras

    import fastsepconv

    for ours, kind in ((True, fastsepconv.FastSeparableConv2D), (False, keras.layers.SeparableConv2D)):
        model = cuda_networks.build(CudaNetwork(PREDICT, "bfloat16", **NETWORK), "bfloat16", ours=ours)
        layers = [layer for layer in model.layers if isinstance(layer, keras.layers.SeparableConv2D)]
        assert len(layers) == 34 and all(type(layer) is kind for layer in layers)
        assert {(layer.compute_dtype, layer.variable_dtype) for layer in layers} == {("bfloat16", "float32")}
    assert keras.config.dtype_policy().name == "float32"


def test_a_timed_step_trains(models):
    problem, built = models
    images, labels = cuda_networks.inputs(problem, 2)
    before = built[OURS].get_weights()
    for model in built.values():
        cuda_networks.step(problem, model, images, labels)()
    moved = [abs(now - old).max() for now, old in zip(built[OURS].get_weights(), before, strict=True)]
    assert sum(m > 0 for m in moved) > len(moved) / 2
    after = [model(images, training=False).detach() for model in built.values()]
    assert (after[0] - after[1]).norm() < 0.05 * after[0].norm()


def test_wrong_networks_are_found_out(models, monkeypatch):
    problem, built = models
    kernels = [v for v in built[OURS].trainable_variables if "pointwise_kernel" in v.path]
    kernels[-1].assign(kernels[-1] * 1.05)
    assert {label: e["status"] for label, e in cuda_networks.judged(problem, built).items()} == {
        STOCK: "right", OURS: "wrong",
    }  # fmt: skip
    kernels[-1].assign(kernels[-1] * torch.nan)
    assert "off by inf" in cuda_networks.judged(problem, built)[OURS]["reason"]
    compute = cuda_networks.results

    def fails(problem, model, *inputs, ours=False):
        if isinstance(model, str) or model is built[OURS]:
            raise torch.cuda.OutOfMemoryError("no room\nat all")
        return compute(problem, model, *inputs)

    monkeypatch.setattr(cuda_networks, "results", fails)
    found = cuda_networks.judged(problem, built)[OURS]
    assert found == {"status": "failed", "reason": "OutOfMemoryError: no room"}
    monkeypatch.setattr(cuda_networks, "build", fails)
    everyone = cuda_networks.race(problem, 1.0)
    assert {label: each["status"] for label, each in everyone.items()} == {OURS: "failed", STOCK: "failed"}


def test_the_networks_operations_are_those_of_the_model():
    model = cuda_networks.build(CudaNetwork(PREDICT, "float32"), "float32")
    total = 0
    for layer in model.layers:
        pixels = torch.Size(layer.output.shape[1:-1]).numel()
        total += sum(2 * pixels * torch.Size(w.shape).numel() for w in layer.weights if "kernel" in w.name)
    assert CudaNetwork(PREDICT, "float32").flops == pytest.approx(32 * total, rel=0.01)
    assert CudaNetwork(TRAIN, "float32").flops == 3 * CudaNetwork(PREDICT, "float32").flops


def test_calls_are_timed_by_events(monkeypatch):
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    def step():
        clock[0] += 20.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = cuda_timing.Calls(step)
    assert calls.seconds(3) == pytest.approx([0.02] * 3) and len(calls.host) == 3
    assert {name: len(rounds) for name, rounds in cuda_timing.race({"a": calls}, 5, 1.0).items()} == {"a": 5}


def test_networks_need_keras_on_torch(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert cuda_networks.obstacle() is None
    monkeypatch.setitem(sys.modules, "keras", None)
    assert cuda_networks.obstacle().startswith("Keras cannot be imported (")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert cuda_networks.obstacle() == "Keras runs on jax, not on torch"
