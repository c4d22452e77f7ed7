"""`fastsepconv convert` and `fastsepconv verify` on saved models."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from fastsepconv import FastSeparableConv2D
from fastsepconv.cli import checkpoint, main
from fastsepconv.cli.console import BAD_FILE, CHECK_FAILED, OK, USAGE
from fastsepconv.layers import FastDepthwiseConv2D


@pytest.fixture
def stock(tmp_path):
    """The file of a small stock model whose input size is open."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.SeparableConv2D(4, 3, activation="relu", name="first"),
        keras.layers.DepthwiseConv2D(3, name="second"),
        keras.layers.GlobalAveragePooling2D(),
    ]
    keras.Sequential([keras.Input((None, None, 2)), *layers]).save(tmp_path / "stock.keras")
    return tmp_path / "stock.keras"


def test_there_and_back_again(stock, tmp_path, run_json):
    fast, back = tmp_path / "fast.keras", tmp_path / "back.keras"
    code, document = run_json("convert", stock, fast)
    assert code == OK and document["layers"] == ["first", "second"]
    assert run_json("convert", fast, back, "--revert")[0] == OK
    models = [checkpoint.load(path) for path in (stock, fast, back)]
    assert [type(layer) for layer in models[1].layers[:2]] == [FastSeparableConv2D, FastDepthwiseConv2D]
    assert models[2].get_config() == models[0].get_config()
    x = np.random.default_rng(0).random((2, 9, 8, 2)).astype(np.float32)
    outputs = [model.predict(x, verbose=0) for model in models]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs[2], outputs[0])


def test_labels_survive_a_conversion(finished_run, tmp_path):
    assert main(["convert", str(finished_run / "model.keras"), str(tmp_path / "stock.keras"), "--revert"]) == OK
    assert checkpoint.training(tmp_path / "stock.keras")["labels"] == ["dark", "grey", "bright"]


def test_convert_says_no(stock, tmp_path, capsys):
    out = str(tmp_path / "out.keras")
    assert main(["convert", str(stock), out, "--revert"]) == CHECK_FAILED
    assert "holds no layer to revert" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.keras"), out]) == BAD_FILE
    assert main(["convert", str(stock), str(stock)]) == USAGE
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(stock), str(tmp_path / "out.h5")]) == USAGE
    assert main(["convert", str(stock), str(tmp_path / "nowhere" / "out.keras")]) == USAGE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stock.keras"]


def test_verify_agrees(stock, run_json, capsys):
    code, document = run_json("verify", stock, "--size", 7, 9, "--batch", 3, "--seed", 1)
    assert code == OK and document["passed"]
    assert document["max_output_error"] < 1e-5 and document["max_gradient_error"] < 1e-4
    assert {layer["name"] for layer in document["layers"]} == {"first", "second"}
    assert main(["verify", str(stock), "--training"]) == OK
    out = capsys.readouterr().out
    assert "first" in out and "second" in out


def test_verify_fails_where_the_kernels_are_wrong(stock, monkeypatch, run_json):
    right = FastSeparableConv2D.call
    monkeypatch.setattr(FastSeparableConv2D, "call", lambda self, x: right(self, x) * 1.01)
    code, document = run_json("verify", stock)
    assert code == CHECK_FAILED and not document["passed"]


def test_verify_wants_a_model_with_something_to_compare(tmp_path, capsys):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "flat.keras")
    assert main(["verify", str(tmp_path / "flat.keras")]) == BAD_FILE
    message = capsys.readouterr().err
    assert "flat.keras" in message and "Traceback" not in message
