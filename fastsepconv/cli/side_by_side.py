"""The same weights in two networks, one on FastSeparableConv2D and one on Keras's layer: results and times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np

from fastsepconv import bridge
from fastsepconv.cli import training
from fastsepconv.cli.console import Console
from fastsepconv.cli.data import Dataset, Images, scaled
from fastsepconv.cli.progress import Compilation
from fastsepconv.cli.recipe import Recipe
from fastsepconv.verify import Report, verify

VERIFIED_IMAGES = 16  # one batch through both networks, eagerly and with every layer's result looked at
FLOAT64_IMAGES = 4  # the same in float64
ROUNDS, STEPS = 2, 2  # of alternating timing; the first step of each turn is not counted


class Times(NamedTuple):
    """Seconds, the median of all counted steps."""

    train_step: float
    prediction: float


class GradientErrors(NamedTuple):
    """One gradient, that of "layer/variable" or of the images: norm of the difference over norm of Keras's."""

    of: str
    float32: float
    float64: float


class Comparison(NamedTuple):
    """What `compare` measures. Errors: outputs absolute, gradients by relative norm (the worst of `gradients`)."""

    accuracies: tuple[float, float]
    output_error: float
    gradient_error: float
    float64_output_error: float
    float64_gradient_error: float
    gradients: tuple[GradientErrors, ...]
    batch_size: int
    times: tuple[Times, Times]


def compare(ours: keras.Model, stock: keras.Model, dataset: Dataset, recipe: Recipe, console: Console) -> Comparison:
    """Give `stock` the weights of `ours`, compare what both compute, then time both (which trains them further)."""
    stock.set_weights(ours.get_weights())
    x, y = scaled(dataset.test.x), dataset.test.y
    with console.progress() as bars, Compilation().shown(bars):
        task = bars.add_task("comparing", total=4, note="outputs")
        outputs = [model.predict(x, batch_size=recipe.batch_size, verbose=0) for model in (ours, stock)]
        bars.update(task, completed=1, note="gradients")
        single = verify(ours, x[:VERIFIED_IMAGES], y[:VERIFIED_IMAGES], training=True)
        weights = ours.get_weights()
        bars.update(task, completed=2, note="times")
        times = _times(ours, stock, dataset, recipe)
        bars.update(task, completed=3, note="float64")  # last: a seed is set, and TensorFlow forgets prepared graphs
        double = _verify_float64(weights, dataset, recipe)
    first, second = (float((output.argmax(axis=1) == y).mean()) for output in outputs)
    return Comparison(
        (first, second),
        float(np.abs(outputs[0] - outputs[1]).max()),
        single.max_gradient_error,
        double.max_output_error,
        double.max_gradient_error,
        _gradients(single, double),
        recipe.batch_size,
        times,
    )


def kernels() -> ModuleType:
    """The bridge from Keras's backend to the kernels; `load_keras` has seen to it that there is one."""
    module = bridge.for_backend(keras.backend.backend())
    if module is None:
        raise RuntimeError(f"There is no bridge for Keras's backend {keras.backend.backend()!r}.")
    return module


def document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain dicts and numbers, for JSON."""
    names = ("fastsepconv", "keras")
    return {
        **comparison._asdict(),
        "accuracies": dict(zip(names, comparison.accuracies, strict=True)),
        "gradients": [errors._asdict() for errors in comparison.gradients],
        "times": {name: times._asdict() for name, times in zip(names, comparison.times, strict=True)},
    }


def _gradients(single: Report, double: Report) -> tuple[GradientErrors, ...]:
    """Those of every variable, in the order of the layers' calls, and that of the input."""
    found = [
        GradientErrors(f"{layer.name}/{variable}", error, twin.gradient_errors[variable])
        for layer, twin in zip(single.layers, double.layers, strict=True)
        for variable, error in layer.gradient_errors.items()
    ]
    return (*found, GradientErrors("the input images", single.input_gradient_error, double.input_gradient_error))


def _verify_float64(weights: list[np.ndarray], dataset: Dataset, recipe: Recipe) -> Report:
    twin = training.build(replace(recipe, dtype="float64"), dataset.test.x.shape[1:], len(dataset.labels), steps=1)
    twin.set_weights(weights)
    x = scaled(dataset.test.x[:FLOAT64_IMAGES]).astype("float64")
    return verify(twin, x, dataset.test.y[:FLOAT64_IMAGES], training=True)


def _times(ours: keras.Model, stock: keras.Model, dataset: Dataset, recipe: Recipe) -> tuple[Times, Times]:
    """Time both in turns of a few steps, so that whatever slows the machine slows both."""
    size = recipe.batch_size
    chosen = np.resize(np.arange(len(dataset.train.x)), size * (STEPS + 1))
    images = Images(dataset.train.x[chosen], dataset.train.y[chosen])
    batches, x = training.feed(training.Batches(images, recipe)), scaled(images.x)
    stopwatches = (_Stopwatch(), _Stopwatch())
    for _ in range(ROUNDS):
        for model, stopwatch in zip((ours, stock), stopwatches, strict=True):
            model.fit(batches, shuffle=False, verbose=0, callbacks=[stopwatch])
            model.predict(x, batch_size=size, verbose=0, callbacks=[stopwatch])
    first, second = (Times(median(each.train), median(each.predict)) for each in stopwatches)
    return first, second


class _Stopwatch(keras.callbacks.Callback):
    """Times each step, the work of a card included, but a turn's first: it pays for the other model's having run."""

    def __init__(self) -> None:
        super().__init__()
        self.train: list[float] = []
        self.predict: list[float] = []
        self.began = 0.0

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self.began = time.perf_counter()

    on_predict_batch_begin = on_train_batch_begin

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._note(batch, self.train)

    def on_predict_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._note(batch, self.predict)

    def _note(self, batch: int, times: list[float]) -> None:
        kernels().synchronize()
        if batch:
            times.append(time.perf_counter() - self.began)
