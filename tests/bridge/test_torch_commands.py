"""The commands with Keras on PyTorch: each in its own process, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from fastsepconv.cli import train

from .torch_cases import torch

SMALL = ("--images", "120", "--num-blocks", "0", "--epochs", "1", "--batch-size", "32")


def command(*arguments: str) -> dict:
    """The JSON document of a command, with TensorFlow out of reach."""
    code = f"""
import sys
sys.modules["tensorflow"] = None  # whatever asks for it is told that it is not there
from fastsepconv.cli import main
sys.exit(main({[*arguments, "--json"]!r}))
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, command("demo", "--out", str(out), *SMALL)


def test_demo_finds_both_networks_equal(demo):
    _, document = demo
    assert document["passed"]
    values = {check["name"]: check["value"] for check in document["checks"]}
    assert values["initial weights, differing networks"] == 0
    assert values["float64 outputs, largest difference"] < 1e-9
    assert 0 < values["float64 gradients, worst of all variables"] < 1e-9


def test_predict_and_verify_take_the_trained_model(demo):
    out, _ = demo
    model = str(out / "fastsepconv" / "model.keras")
    assert len(command("predict", str(out / "images"), "--model", model)["images"]) == 12
    assert command("verify", model)["passed"]


def test_pytorchs_own_products_are_exact_for_the_demo():
    from fastsepconv.bridge import torch as bridge

    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        bridge.exact_float32()
        assert not any(switch.allow_tf32 for switch in switches)
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def test_tensorflow_that_only_writes_the_log_is_kept_off_cards(monkeypatch):
    hidden = []
    config = types.SimpleNamespace(set_visible_devices=lambda *arguments: hidden.append(arguments))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    train._keep_tensorflow_off_cards()
    assert hidden == [([], "GPU")]


def test_doctor_tells_of_pytorch():
    document = command("doctor")
    assert document["well"] and document["checks"]["torch"]["details"]["torch"] == torch.__version__


def test_train_goes_on_from_its_checkpoint(demo, tmp_path):
    data, out = str(demo[0] / "data"), str(tmp_path / "run")
    recipe = ("--num-blocks", "0", "--batch-size", "32")
    first = command("train", "--data", data, "--out", out, "--epochs", "1", *recipe)
    second = command("train", "--resume", "--out", out, "--epochs", "2")
    assert len(second["history"]["loss"]) == 2
    assert second["history"]["loss"][0] == first["history"]["loss"][0]
    assert np.isfinite(second["history"]["loss"]).all()
