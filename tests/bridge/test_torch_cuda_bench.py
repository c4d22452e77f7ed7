"""Who is raced on a card, on the CPU: every provider computes the same, and whoever does not is found out."""

from __future__ import annotations

import json
import os

import pytest

from fastsepconv.bench import cuda
from fastsepconv.bench.cuda_problems import BACKWARD, BOTH, FORWARD, NUMBERS, CudaProblem

from .torch_cases import torch

from fastsepconv.bench import cuda_providers, cuda_timing  # isort: skip  # they import PyTorch

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
    problem = small("separable", BOTH)
    make = cuda_providers.tensors
    Timed.made = 0
    monkeypatch.setattr(cuda, "obstacle", lambda: None)
    monkeypatch.setattr(cuda, "problems", lambda quick: [problem])
    monkeypatch.setattr(cuda_providers, "tensors", lambda problem, device, seed: make(problem, "cpu", seed))
    monkeypatch.setattr(cuda_timing, "Replay", Timed)
    monkeypatch.setattr(cuda_timing, "cache_bytes", lambda: 2**10)
    monkeypatch.setattr(cuda_timing, "ceilings", lambda: dict.fromkeys(("copy", "float32", "tf32", "bfloat16"), 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Not a Card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "plain")
    file = tmp_path / "run.json"
    assert cuda.main(["--quick", "--save", str(file)]) == cuda.OK
    run = json.loads(file.read_text())
    (record,) = run["problems"]
    assert record["providers"]["cuDNN"]["ratio"]["ratio"] == pytest.approx(2)
    assert run["card"] == "Not a Card" and run["tier"] == "plain" and run["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert f"{problem.name} [" in said and "| separable forward+backward, float32, batch 2 |" in said

    monkeypatch.setattr(cuda, "BOUNDS", {"float32": 0.0})
    assert cuda.main(["--save", str(file)]) == cuda.CHECK_FAILED
    assert "Not timed:" in capsys.readouterr().out
