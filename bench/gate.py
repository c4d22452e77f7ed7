"""The gate before the clock: whoever computes something else is not timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import data
from .problems import BFLOAT16, PREDICT, TRAIN, Layer, Problem

# Largest error over largest value of the float64 reference, tensor by tensor, for one float32 layer. The gradients of
# a 147x147 image sum 172872 products at batch 8, which costs every provider about 1e-5; half precision costs 1e-3.
LAYER_BOUND = 5e-5
# The same in bfloat16, where a rounding costs up to 2^-8 of a number: between two steps, and that of the result.
HALF_BOUND = 2.0**-6
# The same for a network's outputs in inference mode.
OUTPUT_BOUND = 1e-4
# For a train step the norm of the error over the norm of the reference. Float32 flips some of the ReLUs that float64
# leaves alone and small batches are normalised, so that stock TensorFlow is off by 5e-3; a wrong gradient is off by 1.
# A gradient that is nothing but rounding (a bias before batch normalisation) counts as this part of the largest one.
TRAIN_BOUND, NEGLIGIBLE = 2e-2, 1e-2
TINY = 1e-30


def bound(problem: Problem) -> float:
    """The largest error that is let through."""
    if isinstance(problem, Layer):
        return HALF_BOUND if problem.dtype == BFLOAT16 else LAYER_BOUND
    return OUTPUT_BOUND if problem.mode == PREDICT else TRAIN_BOUND


def check(problem: Problem, reference: Path, results: Path) -> tuple[dict[str, float], str | None]:
    """The error of every tensor, and a sentence about the worst one past its bound, or None.

    The folders hold `first` and `last`: the outputs of the first and the last weight set.
    """
    errors: dict[str, float] = {}
    for which in ("first", "last"):
        expected, actual = data.load(reference / which), data.load(results / which)
        for name, error in _errors(problem, expected, actual).items():
            errors[name] = max(error, errors.get(name, 0.0))
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= bound(problem):
        return errors, None
    return errors, f"the error of {worst} is {errors[worst]:.1e}, above {bound(problem):.0e}"


def _errors(problem: Problem, expected: data.Arrays, actual: data.Arrays) -> dict[str, float]:
    """One error a tensor; infinite where a tensor is missing, has another shape or holds what is not finite."""
    by_norm = problem.mode == TRAIN
    size = _norm if by_norm else _largest
    least = NEGLIGIBLE * max(size(value) for value in expected.values()) if by_norm else TINY
    errors = {}
    for name, value in expected.items():
        got = actual.get(name)
        if got is None or got.shape != value.shape or not np.isfinite(got).all():
            errors[name] = float("inf")
        else:
            errors[name] = size(got - value) / max(size(value), least)
    return errors


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))
