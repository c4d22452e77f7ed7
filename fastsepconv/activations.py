"""The element-wise activations of `keras.activations`, by name, in NumPy: same formulas, same defaults.

The four that only cut values off at both ends are left to the kernel, as a `clamp`; the others follow it. What Keras
makes of NaN and infinities, these make of them too. In float64 the constants are exact, where TensorFlow rounds those
of gelu and leaky_relu to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from . import checks

Function = Callable[[np.ndarray], np.ndarray]


class Activation(NamedTuple):
    """What the kernel does to each value, and what is done to the whole output afterwards."""

    clamp: tuple[float, float] = (-np.inf, np.inf)
    function: Function | None = None


CLAMPS = {"linear": (-np.inf, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0), "hard_tanh": (-1.0, 1.0)}

SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805


def celu(x):
    """max(x, 0) + expm1(min(x, 0))."""
    return np.maximum(x, 0) + np.expm1(np.minimum(x, 0))


def elu(x):
    """x where x > 0, expm1(x) elsewhere."""
    return np.where(x > 0, x, np.expm1(x))


def gelu(x):
    """x times the normal distribution's share below x, exactly (not by tanh)."""
    share = np.empty(x.size, x.dtype)
    _erfc()((x * x.dtype.type(-math.sqrt(0.5))).ravel(), share)
    return 0.5 * x * share.reshape(x.shape)


@cache
def _erfc():
    """The complementary error function, which NumPy lacks."""
    from .kernels.cpu.jit import kernel

    @kernel
    def erfc(values, results):
        for i in range(values.size):
            results[i] = math.erfc(values[i])

    return erfc


def hard_shrink(x):
    """x where |x| > 0.5, 0 elsewhere."""
    return np.where(np.abs(x) > 0.5, x, x.dtype.type(0))


def hard_sigmoid(x):
    """relu6(x + 3) / 6."""
    return np.clip(x + 3, 0, 6) / 6


def hard_silu(x):
    """x * hard_sigmoid(x)."""
    return x * hard_sigmoid(x)


def leaky_relu(x):
    """x where x > 0, 0.2 * x elsewhere."""
    return np.where(x > 0, x, x.dtype.type(0.2) * x)


def log_sigmoid(x):
    """log(sigmoid(x)) = -softplus(-x)."""
    return -softplus(-x)


def mish(x):
    """x * tanh(softplus(x))."""
    return x * np.tanh(softplus(x))


def selu(x):
    """A scaled elu."""
    kind = x.dtype.type
    return np.where(x > 0, kind(SELU_SCALE) * x, kind(SELU_SCALE * SELU_ALPHA) * np.expm1(x))


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def soft_shrink(x):
    """x drawn 0.5 towards 0, and 0 where it is nearer than that."""
    half = x.dtype.type(0.5)
    return np.where(x > half, x - half, np.where(x < -half, x + half, x.dtype.type(0)))


def softplus(x):
    """log(1 + exp(x))."""
    return np.logaddexp(x, x.dtype.type(0))


def softsign(x):
    """x / (1 + |x|)."""
    return x / (1 + np.abs(x))


def sparse_plus(x):
    """0 up to -1, (x + 1)^2 / 4 up to 1, x from there."""
    return np.where(x <= -1, x.dtype.type(0), np.where(x < 1, (x + 1) ** 2 / 4, x))


def sparse_sigmoid(x):
    """0 up to -1, (x + 1) / 2 up to 1, 1 from there."""
    return np.clip((x + 1) / 2, 0, 1)


def squareplus(x):
    """(x + sqrt(x^2 + 4)) / 2."""
    return (x + np.sqrt(x * x + 4)) / 2


def tanh_shrink(x):
    """x - tanh(x)."""
    return x - np.tanh(x)


FUNCTIONS: dict[str, Function] = {
    "celu": celu,
    "elu": elu,
    "exponential": np.exp,
    "gelu": gelu,
    "hard_shrink": hard_shrink,
    "hard_sigmoid": hard_sigmoid,
    "hard_silu": hard_silu,
    "hard_swish": hard_silu,
    "leaky_relu": leaky_relu,
    "log_sigmoid": log_sigmoid,
    "mish": mish,
    "selu": selu,
    "sigmoid": sigmoid,
    "silu": silu,
    "soft_shrink": soft_shrink,
    "softplus": softplus,
    "softsign": softsign,
    "sparse_plus": sparse_plus,
    "sparse_sigmoid": sparse_sigmoid,
    "squareplus": squareplus,
    "swish": silu,
    "tanh": np.tanh,
    "tanh_shrink": tanh_shrink,
}
NAMES = tuple(sorted((*CLAMPS, *FUNCTIONS)))


def get(activation: object) -> Activation:
    """The activation of that name, or that callable; None is "linear"."""
    if activation is None:
        return Activation()
    if isinstance(activation, str):
        if activation in CLAMPS:
            return Activation(clamp=CLAMPS[activation])
        if activation in FUNCTIONS:
            return Activation(function=_silently(FUNCTIONS[activation]))
    elif callable(activation):
        return Activation(function=lambda y: _real(activation(y), y.shape))
    names = ", ".join(NAMES)
    expected = f"None, a function of an array, or the name of an element-wise activation of Keras ({names})"
    raise checks.invalid("activation", expected, activation)


def _silently(function: Function) -> Function:
    """Overflow and NaN pass through activations as through the convolution itself, without NumPy's warnings."""

    def call(y: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(y)

    return call


def _real(result: object, shape: tuple[int, ...]) -> np.ndarray:
    """What the caller's own activation returned, seen to be numbers of the shape that it was given."""
    array = np.asarray(result)
    if array.shape != shape:
        expected = f"a function that keeps the shape {shape} of what it is given"
        raise checks.invalid("activation", expected, array.shape, " with a result of shape")
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        expected = "a function that returns real numbers"
        raise checks.invalid("activation", expected, array.dtype.name, " with a result of dtype", TypeError)
    return array
