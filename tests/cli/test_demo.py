"""The demo, whole but small: few images, no middle blocks, one epoch. `make demo` is the full one."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastsepconv import dispatch
from fastsepconv.cli import demo, main, side_by_side
from fastsepconv.cli.console import CHECK_FAILED, OK, USAGE, Console, choose_backend

SMALL = ("--images", "120", "--num-blocks", "0", "--epochs", "1", "--batch-size", "32")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, JSON document, what went to stderr) of a demo in a process of its own."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "fastsepconv", "demo", "--json", "--out", str(out), *SMALL]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert process.returncode == OK, process.stdout + process.stderr
    return out, json.loads(process.stdout), process.stderr


def test_both_networks_agree(finished):
    _, document, _ = finished
    assert document["passed"]
    values = {check["name"]: check["value"] for check in document["checks"]}
    assert values["initial weights, differing networks"] == 0
    assert values["outputs, largest difference"] < 1e-4
    assert values["gradients, worst of all variables"] < 1e-3
    assert 0 < values["float64 outputs, largest difference"] < 1e-9
    assert 0 < values["float64 gradients, worst of all variables"] < 1e-9


def test_every_gradient_is_told_by_the_name_of_its_variable(finished):
    document = finished[1]["same_weights"]
    errors = {each["of"]: each for each in document["gradients"]}
    separable = {f"entry_block1_separable1/{name}" for name in ("depthwise_kernel", "pointwise_kernel", "bias")}
    assert separable | {"predictions/kernel", "the input images"} <= errors.keys()
    assert len(errors) == len(document["gradients"]) > 60
    assert max(each["float32"] for each in errors.values()) == document["gradient_error"]
    assert max(each["float64"] for each in errors.values()) == document["float64_gradient_error"]


def test_the_worst_gradients_have_a_row_each_and_the_others_one():
    gradients = [side_by_side.GradientErrors(f"layer/{i}", i * 1e-7, (20 - i) * 1e-16) for i in range(20)]
    rows = demo._gradient_rows(gradients)
    assert rows[0] == ("layer/19", "1.9e-06", "1.0e-16")
    assert [row[0] for row in rows[1:]] == [f"layer/{i}" for i in (18, 17, 16, 15, 14)] + ["the worst of the 14 others"]
    assert rows[-1][1:] == ("1.3e-06", "2.0e-15")
    assert demo._gradient_rows(gradients[:2]) == [("layer/1", "1.0e-07", "1.9e-15"), ("layer/0", "0.0e+00", "2.0e-15")]


def test_a_gradient_that_is_no_number_is_the_worst():
    gradients = [side_by_side.GradientErrors(name, error, error) for name, error in (("a", 1.0), ("b", float("nan")))]
    assert demo._gradient_rows(gradients)[0] == ("b", "nan", "nan")
    assert demo._gradient_rows([gradients[1], *gradients[:1] * 7])[0] == ("b", "nan", "nan")


def test_accuracy_is_not_judged_in_a_small_demo(finished):
    assert not any("held-out" in check["name"] for check in finished[1]["checks"])


def test_it_measures_times_of_both(finished):
    times = finished[1]["same_weights"]["times"]
    assert set(times) == {"fastsepconv", "keras"}
    assert all(0 < seconds < 60 for each in times.values() for seconds in each.values())
    assert set(finished[1]["compilation"]) == {"kernels", "seconds"}


def test_both_were_trained_by_the_same_code_on_the_tutorials_files(finished):
    out, document, _ = finished
    assert {path.name for path in (out / "data").iterdir()} == {
        "X_train.npy",
        "X_test.npy",
        "y_train.npy",
        "y_test.npy",
    }
    assert np.load(out / "data" / "X_train.npy").shape == (96, 48, 48, 1)
    for network in ("fastsepconv", "keras"):
        assert {"model.keras", "history.json", "learning_curve.png"} <= {
            path.name for path in (out / network).iterdir()
        }
        assert json.loads((out / network / "history.json").read_text()) == document["history"][network]
    start = [document["history"][network]["loss"][0] for network in ("fastsepconv", "keras")]
    np.testing.assert_allclose(*start, rtol=1e-2)


def test_progress_goes_to_stderr(finished):
    assert "epoch 1/1" in finished[2] and "Traceback" not in finished[2]


def test_its_picture_and_its_images_are_there(finished, run_json):
    out, document, _ = finished
    assert document["picture"] == str(out / "demo.png") and (out / "demo.png").stat().st_size > 10_000
    code, predicted = run_json("predict", out / "images", "--model", out / "fastsepconv" / "model.keras")
    assert code == OK and len(predicted["images"]) == demo.SAMPLES


def test_pictures_of_another_seed_do_not_stay(tmp_path):
    args = SimpleNamespace(out=tmp_path, images=120, seed=0)
    shown = []
    for args.seed in (0, 1):
        demo._digits(args, Console(json_only=True))
        shown.append({path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()})
    assert len(shown[0]) == len(shown[1]) == demo.SAMPLES
    assert shown[0] != shown[1]


def comparison(**values: float) -> side_by_side.Comparison:
    times = side_by_side.Times(1.0, 1.0)
    gradients = (side_by_side.GradientErrors("layer/kernel", 1e-5, 1e-12),)
    right = side_by_side.Comparison((1.0, 1.0), 1e-6, 1e-5, 1e-15, 1e-12, gradients, 64, (times, times))
    return right._replace(**values)


def outcome(accuracy: float = 1.0) -> SimpleNamespace:
    """What a training run gives, as far as the demo looks at it."""
    history = {"val_loss": [1.0], "val_accuracy": [accuracy]}
    return SimpleNamespace(
        model=None,
        state={"initial_weights": "the same", "history": history, "recipe": {}},
        accuracy=accuracy,
        probabilities=np.eye(10)[np.arange(20) % 10],
        compilation=SimpleNamespace(kernels=["one"], seconds=1.0),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_error", 1.1e-4),
        ("gradient_error", 1.1e-3),
        ("float64_output_error", 1.1e-9),
        ("float64_gradient_error", 1.1e-9),
        ("output_error", float("nan")),
        ("gradient_error", float("nan")),
    ],
)
def test_each_disagreement_fails_a_check(field, value):
    checks = demo._agreement(outcome(), outcome(), comparison(**{field: value}))
    assert [check.passed for check in checks].count(False) == 1
    assert all(check.passed for check in demo._agreement(outcome(), outcome(), comparison()))


@pytest.mark.parametrize(
    ("ours", "stock", "passed"), [(0.99, 0.985, True), (0.979, 0.979, False), (0.981, 0.995, False)]
)
def test_accuracy_has_to_be_high_and_near_keras(ours, stock, passed):
    assert all(check.passed for check in demo._accuracy(outcome(ours), outcome(stock))) is passed


def test_a_backend_that_cannot_run_here_is_refused_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dispatch, "_obstacle", lambda backend: "there is no card" if backend.name == "cuda" else None)
    assert main(["demo", "--backend", "cuda", "--out", str(tmp_path / "demo")]) == USAGE
    said = capsys.readouterr()
    assert "there is no card. Received: backend='cuda'" in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", ["reference", None])
def test_the_backend_that_is_named_computes(monkeypatch, name):
    monkeypatch.setattr(dispatch, "_chosen", "cpu")
    choose_backend(name)
    assert dispatch.get_backend() == (name or "cpu")


def test_a_step_is_over_when_the_card_is_done(monkeypatch):
    clock, waited = [0.0], []
    bridge = SimpleNamespace(synchronize=lambda: waited.append(clock.append(clock.pop() + 1.0)))
    monkeypatch.setattr(side_by_side, "kernels", lambda: bridge)
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: clock[0])
    stopwatch = side_by_side._Stopwatch()
    for batch in range(3):
        stopwatch.on_train_batch_begin(batch)
        stopwatch.on_train_batch_end(batch)
        stopwatch.on_predict_batch_begin(batch)
        stopwatch.on_predict_batch_end(batch)
    assert stopwatch.train == stopwatch.predict == [1.0, 1.0] and len(waited) == 6


@pytest.mark.parametrize(("error", "code"), [(1e-6, OK), (1e-3, CHECK_FAILED)])
def test_a_failed_check_is_the_exit_code(tmp_path, monkeypatch, capsys, error, code):
    monkeypatch.setattr(demo, "execute", lambda *args: outcome())
    monkeypatch.setattr(demo, "show_operations", lambda *args: None)
    monkeypatch.setattr(side_by_side, "compare", lambda *args: comparison(output_error=error))
    assert main(["demo", "--out", str(tmp_path), "--images", "100"]) == code
    assert ("A check failed" in capsys.readouterr().out) is (code != OK)
