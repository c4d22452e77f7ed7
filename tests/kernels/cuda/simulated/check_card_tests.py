"""A rehearsal of the tests on a card, in the simulator on tensors of the CPU: that they compute, compare and note.

Run by `tests/bridge/test_torch_cuda.py`, where PyTorch is installed.
"""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from fastsepconv.bridge import torch_cuda
from fastsepconv.kernels import cuda, nvidia
from tests import goldens, on_card
from tests.kernels.cuda import card_cases, test_on_card_goldens, test_on_card_results
from tests.ledger import VARIABLE
from tests.on_card import DTYPES, torch

SMALL = ["plain", "same, multiplier", "unequal strides", "padding beyond the kernel", "empty batch"]
RESULTS = test_on_card_results


@pytest.fixture(autouse=True)
def ledger(monkeypatch, tmp_path):
    """The lines of the ledger so far; the card is the CPU."""
    monkeypatch.setattr(on_card, "DEVICE", "cpu")
    monkeypatch.setattr(torch_cuda, "current_stream", lambda device: 1)
    file = tmp_path / "ledger.jsonl"
    monkeypatch.setenv(VARIABLE, str(file))
    monkeypatch.setattr(nvidia, "look", lambda: ("none", []))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("operation", RESULTS.OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_results(case, dtype, operation, ledger):
    RESULTS.test_is_the_reference(case, dtype, operation, "plain")
    line = {"operation": operation, "tier": "plain", "dtype": dtype, "card": "none"}
    assert ledger() == [line | {"event": "begun"}, line | {"event": "passed"}]


def test_a_wrong_result_fails_and_is_noted(monkeypatch, ledger):
    right = cuda.depthwise_forward
    monkeypatch.setattr(cuda, "depthwise_forward", lambda g, x, kernel, bias, y: right(g, x, kernel, None, y))
    with pytest.raises(AssertionError, match="result 0 of depthwise_forward, plain, float32: off by"):
        RESULTS.test_is_the_reference("plain", "float32", "depthwise_forward", "plain")
    assert [line["event"] for line in ledger()] == ["begun", "failed"]


def test_a_result_that_is_left_out_fails(monkeypatch, ledger):
    monkeypatch.setattr(cuda, "pointwise_forward", lambda *arguments: None)
    with pytest.raises(AssertionError, match="off by nan"):
        RESULTS.test_is_the_reference("plain", "float32", "pointwise_forward", "plain")


def test_memory_beside_a_result_is_watched(monkeypatch):
    def beyond(g, x, kernel, bias, y):
        torch.as_strided(y.owner, (1,), (1,), y.owner.storage_offset() + y.owner.numel()).fill_(0)

    monkeypatch.setattr(cuda, "depthwise_forward", beyond)
    with pytest.raises(AssertionError, match="memory beside a result"):
        RESULTS.test_is_the_reference("plain", "float32", "depthwise_forward", "plain")


def test_a_tier_that_does_not_serve_is_skipped(ledger):
    with pytest.raises(pytest.skip.Exception, match="the fast tier does not serve this call"):
        RESULTS.test_is_the_reference("plain", "float64", "pointwise_forward", "fast")
    assert [line["event"] for line in ledger()] == ["begun", "skipped"]


def test_memory_of_odd_places_and_clamps(ledger, monkeypatch):
    monkeypatch.setattr(RESULTS, "SHIFTED", "plain")
    monkeypatch.setitem(card_cases.ALL, "valid", card_cases.ALL["plain"])
    for operation in RESULTS.OPERATIONS:
        RESULTS.test_memory_that_begins_at_odd_places("bfloat16", operation, "plain")
    for kind in ("depthwise", "pointwise", "separable"):
        RESULTS.test_clamps_and_keeps_nan("float16", kind, "plain", (-1.0, 6.0))
        RESULTS.test_clamps_and_keeps_nan("float32", kind, "plain", (0.0, np.inf))


def test_bits_and_what_is_wanted(monkeypatch):
    monkeypatch.setitem(card_cases.ALL, "96 channels", card_cases.ALL["same, multiplier"])
    for kind in ("depthwise", "pointwise", "separable"):
        RESULTS.test_the_same_bits_at_every_call("float32", f"{kind}_backward", "plain")
        RESULTS.test_only_the_gradients_that_are_wanted("float32", kind, "plain")


@pytest.mark.parametrize("case", ["separable, valid", "depthwise, same", "pointwise"])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_goldens(case, way, dtype):
    assert case in goldens.CASES
    test_on_card_goldens.test_is_what_keras_computes(case, dtype, way, "plain")


def test_every_case_has_a_problem():
    """Those that are too much for the simulator as well: PyTorch computes what the reference does."""
    for case in ("five taps", "dilation, aligned", "wide"):
        for operation in RESULTS.OPERATIONS:
            it = card_cases.problem(operation, case, "float32")
            found = card_cases.by_cudnn(it)
            assert [tuple(result.shape) for result in found] == it.result_shapes
            assert max(RESULTS.errors(found, it)) < 1e-5


def test_a_sick_card_fails_the_test(monkeypatch):
    def sick():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", sick)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    steps = on_card.healthy.__wrapped__()
    next(steps)
    with pytest.raises(pytest.fail.Exception, match="left with an error"), contextlib.suppress(StopIteration):
        next(steps)
