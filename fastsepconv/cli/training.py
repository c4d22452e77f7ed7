"""Training: the one loop behind `fastsepconv train` and `fastsepconv demo`."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from fastsepconv.cli import checkpoint
from fastsepconv.cli.console import CHECK_FAILED, INTERRUPTED, CommandError, Console
from fastsepconv.cli.data import Dataset, Images, Source, scaled
from fastsepconv.cli.interrupts import InterruptsBetweenSteps
from fastsepconv.cli.progress import Compilation, TrainingBar
from fastsepconv.cli.recipe import BEST, LAST, TENSORBOARD, Recipe
from fastsepconv.layers import FastSeparableConv2D
from fastsepconv.models import xception

SEPARABLE_LAYERS = {"fast": FastSeparableConv2D, "keras": keras.layers.SeparableConv2D}
WARM_UP = 0.1  # of all steps, where the schedule is "cosine"


class Outcome(NamedTuple):
    """A finished run. `probabilities` `[n, classes]` are those of the test images."""

    model: keras.Model
    state: dict[str, Any]
    probabilities: np.ndarray
    accuracy: float
    compilation: Compilation
    seconds: float


class Batches(keras.utils.PyDataset):
    """Shuffled, augmented batches. Each depends on (seed, epoch, index) alone, so a resumed run sees the same ones.

    `epoch` is set from outside: Keras calls a dataset's own on_epoch_end at other times too.
    """

    def __init__(self, images: Images, recipe: Recipe, epoch: int = 0):
        super().__init__()
        self.images, self.recipe, self.epoch = images, recipe, epoch

    def __len__(self) -> int:
        return steps_per_epoch(len(self.images.x), self.recipe)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.recipe.batch_size
        order = np.random.default_rng([self.recipe.seed, self.epoch]).permutation(len(self.images.x))
        chosen = order[index * size : (index + 1) * size]
        random = np.random.default_rng([self.recipe.seed, self.epoch, index])
        return augmented(scaled(self.images.x[chosen]), self.recipe, random), self.images.y[chosen]


def feed(batches: Batches) -> Any:
    """What `fit` takes of `batches`: on TensorFlow the same as a dataset that does not tune itself.

    Keras would make one that does, in a thread which TensorFlow waits for when `fit` is over: for up to half a minute.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    signature = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in batches[0])
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_generator(
        lambda: map(batches.__getitem__, range(len(batches))), output_signature=signature
    )
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(1).with_options(options)


def augmented(x: np.ndarray, recipe: Recipe, random: np.random.Generator) -> np.ndarray:
    """Move each image of `[N,H,W,C]` by up to `recipe.shift` pixels (zeros come in); mirror half of them if asked."""
    if recipe.shift:
        _, height, width, _ = x.shape
        margin = (recipe.shift, recipe.shift)
        padded = np.pad(x, ((0, 0), margin, margin, (0, 0)))
        corners = random.integers(0, 2 * recipe.shift + 1, (len(x), 2))
        cuts = zip(padded, corners, strict=True)
        x = np.stack([image[top : top + height, left : left + width] for image, (top, left) in cuts])
    if recipe.flip:
        mirrored = random.random(len(x)) < 0.5
        x = np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    return x


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Batches of an epoch; the last may be a smaller one."""
    return -(-images // recipe.batch_size)


def build(recipe: Recipe, input_shape: tuple[int, ...], classes: int, steps: int) -> keras.Model:
    """The compiled network with the initial weights that `recipe.seed` gives, on whichever layer."""
    keras.utils.set_random_seed(recipe.seed)
    model = xception(
        input_shape,
        classes,
        SEPARABLE_LAYERS[recipe.layer],
        num_blocks=recipe.num_blocks,
        order=recipe.order,
        batch_norm_momentum=recipe.momentum,
        dtype=recipe.dtype,
    )
    optimizer = keras.optimizers.Adam(learning_rate(recipe, steps))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    # Were variables made while Keras traces the first step, it would trace that twice.
    optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros(1), np.ones((1, classes), "float32") / classes)
    model.reset_metrics()
    return model


def learning_rate(recipe: Recipe, steps: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The rate, or its course over all epochs of `steps` steps."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    total = recipe.epochs * steps
    warm_up = max(1, round(WARM_UP * total))
    return keras.optimizers.schedules.CosineDecay(
        WARM_UP * recipe.learning_rate,
        max(1, total - warm_up),
        warmup_target=recipe.learning_rate,
        warmup_steps=warm_up,
    )


def train(
    recipe: Recipe,
    source: Source,
    dataset: Dataset,
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    tensorboard: bool = True,
) -> Outcome:
    """Train, or go on from `out`'s last checkpoint; leaves model.keras and best.keras in `out`.

    Raises CommandError when interrupted or when the loss is no longer a number; the last checkpoint is whole then.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = steps_per_epoch(len(dataset.train.x), recipe)
    began = time.perf_counter()
    compilation = Compilation()
    with console.progress() as bars, compilation.shown(bars), InterruptsBetweenSteps() as interrupts:
        if resume:
            model, state = checkpoint.load(out / LAST), checkpoint.training(out / LAST)
            if recipe.epochs != state["recipe"]["epochs"]:
                model.optimizer.learning_rate = learning_rate(recipe, steps)
            state["recipe"] = asdict(recipe)
        else:
            model = build(recipe, dataset.train.x.shape[1:], len(dataset.labels), steps)
            state = new_state(recipe, source, dataset, model)
        batches = Batches(dataset.train, recipe)
        callbacks = [interrupts, Checkpoints(batches, state, out), TrainingBar(bars, state, recipe.epochs, steps)]
        if tensorboard:
            callbacks.append(keras.callbacks.TensorBoard(out / TENSORBOARD, write_graph=False))
        try:
            model.fit(
                feed(batches),
                shuffle=False,  # Batches does it; Keras would draw from a generator whose state no checkpoint holds
                epochs=recipe.epochs,
                initial_epoch=state["epoch"],
                validation_data=(scaled(dataset.validation.x), dataset.validation.y),
                validation_batch_size=recipe.batch_size,
                callbacks=callbacks,
                verbose=0,
            )
            probabilities = model.predict(
                scaled(dataset.test.x), batch_size=recipe.batch_size, verbose=0, callbacks=[interrupts]
            )
        except KeyboardInterrupt:
            raise CommandError(_interrupted(state, out), INTERRUPTED) from None
    accuracy = float((probabilities.argmax(axis=1) == dataset.test.y).mean())
    return Outcome(model, state, probabilities, accuracy, compilation, time.perf_counter() - began)


def new_state(recipe: Recipe, source: Source, dataset: Dataset, model: keras.Model) -> dict[str, Any]:
    """What a checkpoint carries beside the model and its optimizer."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(weight.tobytes())
    return {
        "recipe": asdict(recipe),
        "source": source._asdict(),
        "labels": list(dataset.labels),
        "fingerprint": dataset.fingerprint(),
        "initial_weights": digest.hexdigest(),
        "epoch": 0,
        "history": {},
    }


def _interrupted(state: Mapping[str, Any], out: Path) -> str:
    if not state["epoch"]:
        return "interrupted before the first epoch ended; nothing was kept"
    return (
        f"interrupted; {out / LAST} holds all {state['epoch']} finished epoch(s). "
        f"Go on with: fastsepconv train --resume --out {out}"
    )


class Checkpoints(keras.callbacks.Callback):
    """Before each epoch: draw its batches. After: note the history, write model.keras, keep the best as best.keras."""

    def __init__(self, batches: Batches, state: dict[str, Any], out: Path):
        super().__init__()
        self.batches, self.state, self.out = batches, state, out
        self.began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self.batches.epoch = epoch
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        values = {name: float(value) for name, value in (logs or {}).items()}
        if not np.isfinite(values["loss"]):
            kept = f"{self.out / LAST} holds epoch {epoch}" if epoch else "nothing was kept"
            raise CommandError(f"the loss is {values['loss']} in epoch {epoch + 1}; {kept}", CHECK_FAILED)
        values["seconds"] = time.perf_counter() - self.began
        history = {name: [*self.state["history"].get(name, []), value] for name, value in values.items()}
        checkpoint.save(self.model, self.out / LAST, {**self.state, "history": history, "epoch": epoch + 1})
        self.state.update(history=history, epoch=epoch + 1)
        if values["val_accuracy"] >= max(history["val_accuracy"]):
            _replace_by_link(self.out / LAST, self.out / BEST)


def _replace_by_link(source: Path, target: Path) -> None:
    """Let `target` be today's `source` without copying it, where the file system can link."""
    partial = target.with_name(f".{target.name}.partial")
    with suppress(FileNotFoundError):
        partial.unlink()
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
