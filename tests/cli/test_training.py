"""`fastsepconv train`: what it leaves behind, and that a resumed run is the run it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from fastsepconv import FastSeparableConv2D
from fastsepconv.cli import checkpoint, data, main
from fastsepconv.cli.console import BAD_FILE, CHECK_FAILED, INTERRUPTED, USAGE, CommandError
from fastsepconv.cli.interrupts import InterruptsBetweenSteps
from fastsepconv.cli.recipe import Recipe
from fastsepconv.cli.training import Batches, augmented, learning_rate

from .conftest import TINY, write_images

LEFT_BEHIND = {
    "model.keras",
    "best.keras",
    "learning_curve.png",
    "confusion_matrix.png",
    "operations.json",
    "history.json",
    "tensorboard",
}


def state_of(path: Path) -> list[np.ndarray]:
    """Every number that the next step depends on."""
    model = checkpoint.load(path)
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


def assert_same_run(a: Path, b: Path) -> None:
    for ours, theirs in zip(state_of(a / "model.keras"), state_of(b / "model.keras"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    histories = [json.loads((run / "history.json").read_text()) for run in (a, b)]
    for history in histories:
        del history["seconds"]
    assert histories[0] == histories[1]


def test_a_run_leaves_everything_that_is_promised(finished_run):
    left = {path.name for path in finished_run.iterdir()}
    assert left - {"model.png"} == LEFT_BEHIND
    assert list(finished_run.glob("tensorboard/*/events.out.tfevents*"))
    history = json.loads((finished_run / "history.json").read_text())
    assert {name: len(values) for name, values in history.items()} == dict.fromkeys(
        ("loss", "accuracy", "val_loss", "val_accuracy", "seconds"), 2
    )
    assert len(json.loads((finished_run / "operations.json").read_text())) == 10
    model = checkpoint.load(finished_run / "model.keras")
    assert sum(isinstance(layer, FastSeparableConv2D) for layer in model.layers) == 10
    assert int(model.optimizer.iterations) == 6


def test_best_is_the_epoch_with_the_best_validation_accuracy(finished_run):
    history = json.loads((finished_run / "history.json").read_text())["val_accuracy"]
    best = checkpoint.training(finished_run / "best.keras")["epoch"]
    assert history[best - 1] == max(history)


def test_it_learns_and_says_so_in_json(images, tmp_path, run_json):
    code, document = run_json(
        "train", "--data", images, "--out", tmp_path / "run", "--epochs", 8, "--layer", "keras", *TINY
    )
    assert code == 0
    assert document["held_out_accuracy"] > 0.9
    assert document["held_out_accuracy"] == document["history"]["val_accuracy"][-1]
    assert document["images"] == {"train": 48, "validation": 16, "test": 16}
    assert document["operations"]["standard"] > 5 * document["operations"]["separable"]
    assert str(tmp_path / "run" / "model.keras") in document["files"]
    model = checkpoint.load(tmp_path / "run" / "model.keras")
    assert not any(isinstance(layer, FastSeparableConv2D) for layer in model.layers)


def test_a_run_that_was_interrupted_and_resumed_is_the_uninterrupted_run(images, tmp_path):
    """A real Ctrl-C to a real process; then every variable of model and optimizer agrees bit for bit."""
    recipe = ["--epochs", "8", "--schedule", "cosine", "--shift", "2", "--flip", "--seed", "5", *TINY]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [sys.executable, "-m", "fastsepconv", "train", "--data", str(images), "--out", str(broken), *recipe]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while not (broken / "model.keras").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED, err
    assert "Traceback" not in err and "--resume" in err

    done = checkpoint.training(broken / "model.keras")["epoch"]
    assert 1 <= done < 8
    assert int(checkpoint.load(broken / "model.keras").optimizer.iterations) == 3 * done
    assert not list(broken.glob(".*partial*"))

    assert main(["train", "--resume", "--out", str(broken)]) == 0
    assert main(["train", "--data", str(images), "--out", str(whole), *recipe]) == 0
    assert_same_run(broken, whole)


def test_a_second_interrupt_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with InterruptsBetweenSteps() as interrupts:
        interrupts.on_train_batch_begin(0)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.on_train_batch_begin(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def copied_run(finished_run, tmp_path) -> Path:
    """A run that a test may spoil."""
    (tmp_path / "run").mkdir()
    os.link(finished_run / "model.keras", tmp_path / "run" / "model.keras")
    return tmp_path / "run"


def test_resuming_may_go_on_for_longer(copied_run, finished_run):
    assert main(["train", "--out", str(copied_run), "--epochs", "3", "--resume"]) == 0
    before, after = (json.loads((run / "history.json").read_text()) for run in (finished_run, copied_run))
    assert {name: values[:2] for name, values in after.items()} == before
    assert all(len(values) == 3 for values in after.values())
    assert int(checkpoint.load(copied_run / "model.keras").optimizer.iterations) == 9


def test_resuming_with_another_recipe_is_refused(copied_run, capsys):
    assert main(["train", "--resume", "--out", str(copied_run), "--batch-size", "8"]) == USAGE
    assert "`--batch-size`. Expected 16" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(copied_run), "--seed", "1"]) == USAGE
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(copied_run), "--labels", "a,b,c"]) == USAGE
    assert "`--labels`. Expected dark,grey,bright" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(copied_run), "--validation", "0.5"]) == USAGE
    assert "`--validation`. Expected 0.0" in capsys.readouterr().err


def test_a_run_begun_anew_leaves_nothing_of_the_old_one_to_resume(copied_run, images, monkeypatch):
    (copied_run / "best.keras").write_bytes(b"old")
    (copied_run / "tensorboard").mkdir()
    monkeypatch.setattr("fastsepconv.cli.training.train", lambda *_, **__: pytest.exit("stopped in the first epoch"))
    with pytest.raises(pytest.exit.Exception):
        main(["train", "--data", str(images), "--out", str(copied_run), "--overwrite"])
    assert list(copied_run.iterdir()) == []


def test_ctrl_c_while_the_pictures_are_drawn_loses_none(copied_run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastsepconv.cli.pictures.confusion_matrix", interrupted)
        assert main(["train", "--resume", "--out", str(copied_run)]) == INTERRUPTED
    assert f"`fastsepconv train --resume --out {copied_run}` draws the pictures" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(copied_run)]) == 0
    assert (copied_run / "confusion_matrix.png").exists()


def test_resuming_on_other_images_is_refused(copied_run, tmp_path, capsys):
    other = write_images(tmp_path / "other", seed=1)
    assert main(["train", "--resume", "--out", str(copied_run), "--data", str(other)]) == BAD_FILE
    assert "Expected the images" in capsys.readouterr().err


def test_a_checkpoint_is_not_overwritten_unasked(copied_run, images, capsys):
    assert main(["train", "--data", str(images), "--out", str(copied_run)]) == USAGE
    assert "--resume" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_is_named(images, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["train", "--data", str(images), "--out", str(tmp_path / "file" / "run")]) == BAD_FILE
    message = capsys.readouterr().err
    assert "file/run" in message and "Traceback" not in message


def test_the_stock_layer_knows_no_other_order(images, tmp_path, capsys):
    arguments = ["train", "--data", str(images), "--out", str(tmp_path / "run"), "--layer", "keras"]
    assert main([*arguments, "--order", "pointwise_depthwise"]) == USAGE
    assert "`--order`" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"text"])
def test_a_broken_checkpoint_is_named(copied_run, content, capsys):
    path = copied_run / "model.keras"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert main(["train", "--resume", "--out", str(copied_run)]) == BAD_FILE
    message = capsys.readouterr().err
    assert "model.keras: " in message and "Expected a .keras file" in message and message.count("\n") == 1


def test_a_checkpoint_of_another_program_is_refused(copied_run, capsys):
    (copied_run / "model.keras").unlink()
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(copied_run / "model.keras")
    assert main(["train", "--resume", "--out", str(copied_run)]) == BAD_FILE
    assert "Received: a file of another program" in capsys.readouterr().err


def test_saving_that_fails_halfway_leaves_the_former_file(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    path = tmp_path / "model.keras"
    checkpoint.save(model, path, {"epoch": 1})
    before = path.read_bytes()

    def half(self, partial):
        Path(partial).write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(model, path, {"epoch": 2})
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["model.keras"]


def test_keras_and_this_package_read_each_others_files(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 2)), FastSeparableConv2D(3, 3)])
    checkpoint.save(model, tmp_path / "ours.keras", {"epoch": 7})
    model.save(tmp_path / "keras.keras")
    for name, training in {"ours.keras": {"epoch": 7}, "keras.keras": {}}.items():
        loaded = keras.models.load_model(tmp_path / name)
        for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert checkpoint.training(tmp_path / name) == training


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_former_epoch(images, tmp_path, monkeypatch, capsys):
    served = Batches.__getitem__

    def spoilt(self, index):
        x, y = served(self, index)
        return (x * np.float32(np.nan) if self.epoch == 1 else x), y

    monkeypatch.setattr(Batches, "__getitem__", spoilt)
    run = tmp_path / "run"
    assert (
        main(["train", "--data", str(images), "--out", str(run), "--epochs", "3", "--layer", "keras", *TINY])
        == CHECK_FAILED
    )
    assert "the loss is nan in epoch 2" in capsys.readouterr().err
    assert checkpoint.training(run / "model.keras")["epoch"] == 1
    assert all(np.isfinite(weight).all() for weight in checkpoint.load(run / "model.keras").get_weights())


def numbered(count: int) -> data.Images:
    """Images of one pixel each that say which they are."""
    return data.Images(np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1), np.arange(count))


def test_an_epoch_serves_every_image_once_in_an_order_of_its_own():
    recipe = Recipe(batch_size=4, seed=1)
    orders = [np.concatenate([batch[1] for batch in Batches(numbered(10), recipe, epoch)]) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(10))
    assert not np.array_equal(*orders)
    x, y = Batches(numbered(10), recipe, 0)[2]
    assert x.shape == (2, 1, 1, 1) and y.shape == (2,)
    np.testing.assert_array_equal(x.ravel(), y)


def test_another_seed_is_another_order():
    orders = [Batches(numbered(64), Recipe(batch_size=64, seed=seed), 0)[0][1] for seed in (0, 1)]
    assert not np.array_equal(*orders)


def test_augmentation_moves_and_mirrors():
    x = np.zeros((400, 5, 6, 1), np.float32)
    x[:, 2, 1] = 1
    moved = augmented(x, Recipe(shift=1), np.random.default_rng(0))
    places = {tuple(np.argwhere(image[..., 0])[0]) for image in moved}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2)}
    mirrored = augmented(x, Recipe(flip=True), np.random.default_rng(0))
    assert {tuple(np.argwhere(image[..., 0])[0]) for image in mirrored} == {(2, 1), (2, 4)}
    assert 150 < mirrored[:, 2, 4].sum() < 250
    assert augmented(x, Recipe(), np.random.default_rng(0)) is x


def test_the_cosine_schedule_rises_and_falls_to_zero():
    recipe = Recipe(epochs=5, learning_rate=0.1, schedule="cosine")
    rates = [float(learning_rate(recipe, steps=20)(step)) for step in range(101)]
    assert (
        rates[0] == pytest.approx(0.01)
        and max(rates) == pytest.approx(0.1)
        and rates[100] == pytest.approx(0, abs=1e-9)
    )
    assert int(np.argmax(rates)) == 10
    assert learning_rate(replace(recipe, schedule="constant"), 20) == 0.1


def test_networks_on_both_layers_start_alike(images):
    from fastsepconv.cli.training import build

    recipe = Recipe(num_blocks=0, seed=4)
    first, second = (build(replace(recipe, layer=layer), (16, 16, 1), 3, 1) for layer in ("fast", "keras"))
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_both_sources_or_none_of_them(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run")]) == USAGE
    assert "--data DIR or --csv FILE" in capsys.readouterr().err
    with pytest.raises(CommandError, match="--validation"):
        data.load(data.Source("folder", str(write_images(tmp_path / "images")), validation=0.001))
