"""A whole network on a card: keras.applications.Xception with Keras on torch, its stock layers against this package's.

Both have the same weights. Steps are called as a user calls them, so that what Keras's Python costs counts for
both; how much that is, is told beside the times of the card. TF32 is off; "bfloat16" is Keras's policy mixed_bfloat16.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from . import cuda_providers, cuda_timing, stats
from .cuda_problems import PREDICT, CudaNetwork
from .cuda_report import OURS, STOCK, one_line

CLASSES = 1000
LEARNING_RATE = 1e-4
CHECKED = 4  # images that the gate looks at, in float64 too
ROUNDS = 5
# Gradients run through some forty ReLUs, which turn at zero, and small batches' statistics: of bfloat16's, two fifths
# are rounding, whoever computes them. So the stock layers have wide bounds, and ours GRANTED times what the stock
# layers' rounding comes to, at least FLOOR, the bound of a single layer. A gradient of zeros is off by 1.
SANE = {"float32": 2e-2, "bfloat16": 0.7}
FLOOR = {"float32": 5e-5, "bfloat16": 2e-2}
GRANTED, MOST = 2.0, 0.9

Results = list[torch.Tensor]


def obstacle() -> str | None:
    """Why no network can be raced here; None: it can."""
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "torch":
        return f"Keras runs on {backend}, not on torch"
    try:
        import keras  # noqa: F401
    except ImportError as error:
        return f"Keras cannot be imported ({error})"
    return None


def race(problem: CudaNetwork, seconds: float) -> dict[str, dict]:
    """What each side did: "timed", "wrong" or "failed", with times, the error, and the ratio of the times to ours."""
    try:
        return _race(problem, seconds)
    except Exception as failure:  # of whatever kind: the layers are raced all the same
        return {label: {"status": "failed", "reason": one_line(failure)} for label in (OURS, STOCK)}


def _race(problem: CudaNetwork, seconds: float) -> dict[str, dict]:
    models = {label: build(problem, problem.numbers, ours=label == OURS) for label in (STOCK, OURS)}
    models[OURS].set_weights(models[STOCK].get_weights())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, benchmark=False):  # no search for a single step
        entries = judged(problem, models)
    with cuda_providers.numeric_switch(problem.numbers):
        images, labels = inputs(problem, problem.batch)
        calls: dict[str, cuda_timing.Calls] = {}
        for label, entry in entries.items():
            if entry["status"] == "right":
                try:
                    calls[label] = cuda_timing.Calls(step(problem, models[label], images, labels))
                except RuntimeError as error:
                    entry |= {"status": "failed", "reason": one_line(error)}
        times = cuda_timing.race(calls, ROUNDS, seconds) if calls else {}
    for label, rounds in times.items():
        entries[label] |= {"status": "timed", "seconds": stats.summary(rounds)}
        entries[label]["host_seconds"] = median(calls[label].host)
        if label == STOCK and OURS in times:
            entries[label]["ratio"] = stats.ratio(times[OURS], rounds)
    return {label: entries[label] for label in (OURS, STOCK)}


def build(problem: CudaNetwork, numbers: str, ours: bool = False) -> Any:
    """The network, in stock layers or ours, on Keras's device, computing in these numbers. It ends in logits."""
    import keras

    import fastsepconv

    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy({"bfloat16": "mixed_bfloat16"}.get(numbers, numbers))
    try:
        shape = (problem.size, problem.size, 3)
        model = keras.applications.Xception(
            weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
        )
        return fastsepconv.convert(model, in_place=True) if ours else model
    finally:
        keras.config.set_dtype_policy(policy)


def inputs(problem: CudaNetwork, batch: int) -> tuple[Any, Any]:
    """Images and labels, random, on Keras's device."""
    import keras

    images = keras.random.uniform((batch, problem.size, problem.size, 3), -1.0, 1.0, "float32", seed=1)
    return images, keras.ops.convert_to_tensor([i * 7 % CLASSES for i in range(batch)], "int32")


def step(problem: CudaNetwork, model: Any, images: Any, labels: Any) -> Callable[[], Results]:
    """What is timed: the prediction, or the whole step of training, which changes the weights."""
    import keras

    if problem.mode == PREDICT:
        return lambda: results(problem, model, images, labels)
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    optimizer.build(model.trainable_variables)

    def train() -> Results:
        logits, *gradients = results(problem, model, images, labels)
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)
        return [logits, *gradients]

    return train


def results(problem: CudaNetwork, model: Any, images: Any, labels: Any) -> Results:
    """The logits and, in training, the gradient of every variable."""
    import keras

    if problem.mode == PREDICT:
        with torch.no_grad():
            return [model(images, training=False)]
    model.zero_grad()
    logits = model(images, training=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits)
    loss.backward()
    return [logits.detach(), *(variable.value.grad for variable in model.trainable_variables)]


def judged(problem: CudaNetwork, models: dict[str, Any]) -> dict[str, dict]:
    """The gate: each side against the stock layers in float64, in the logits and in all gradients together.

    The stock layers are judged by SANE, ours by what rounding did to them.
    """
    exact = build(problem, "float64")
    exact.set_weights(models[STOCK].get_weights())
    images, labels = inputs(problem, min(CHECKED, problem.batch))
    true = results(problem, exact, images, labels)
    del exact
    entries: dict[str, dict] = {}
    for label, model in models.items():
        began = time.monotonic()
        try:
            found = results(problem, model, images, labels)
            first_call = time.monotonic() - began
            error = max(_distance(found[:1], true[:1]), _distance(found[1:], true[1:]))
        except Exception as failure:  # of whatever kind: the other side is timed all the same
            entries[label] = {"status": "failed", "reason": one_line(failure)}
            continue
        entry = entries[label] = {"status": "right", "largest_error": error, "first_call_seconds": first_call}
        stock = entries[STOCK].get("largest_error", 0.0)
        bound = SANE[problem.numbers]
        if label == OURS and entries[STOCK]["status"] == "right":
            bound = min(MOST, max(GRANTED * stock, FLOOR[problem.numbers]))
        if not error <= bound:
            entry |= {"status": "wrong", "reason": f"off by {error:.1e}, more than {bound:.0e}"}
    return entries


def _distance(found: Results, true: Results) -> float:
    """The length of the difference over that of the true values, all tensors taken as one; infinite for a NaN."""
    pairs = list(zip(found, true, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    whole = sum(float(b.double().square().sum()) for _, b in pairs)
    distance = (off / max(whole, 1e-300)) ** 0.5
    return distance if distance == distance else float("inf")
