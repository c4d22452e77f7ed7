"""Element-wise activations on the card, by their names in `keras.activations`: same formulas, same defaults.

Those that only cut values off are left to the convolution's kernel, as its `clamp`. The others follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda, types

from ..device_array import DeviceArray
from . import memory
from .elements import ELEMENTS, SIMULATED, clamped, device_function
from .launch import Kernel, made_once
from .memory import Operand

# Of Python's own functions some raise where NumPy's give an infinity, as a card does.
exp, expm1, log1p, tanh = (
    (np.exp, np.expm1, np.log1p, np.tanh) if SIMULATED else (math.exp, math.expm1, math.log1p, math.tanh)
)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
SAME = {"celu": "elu", "hard_swish": "hard_silu", "swish": "silu"}


def run(name: str, x: DeviceArray, y: DeviceArray) -> None:
    """Fills y with the activation of that name of x, which is of y's shape and may be y itself."""

    def compute(x: Operand, y: Operand, stream) -> None:
        activation_kernel(x.element, y.element).over(count, stream, count, number_of(name), x.pointer, y.pointer)

    count = math.prod(y.shape)
    memory.run(compute, {"x": x}, {"y": y})


@made_once
def activation_kernel(x_element: str, y_element: str) -> Kernel:
    """The kernel for arrays of these elements; x is of the element that y's sums are held in."""
    load, store = ELEMENTS[x_element].load, ELEMENTS[y_element].store
    activated = _choice(list(_formulas(getattr(np, x_element)).values()))

    def activation(count, which, x, y):
        """y[i] = f(x[i]), f the formula of number `which`

        Parallel over: the elements of y. Assumes: nothing of the size.
        """
        i = cuda.grid(1)
        while i < count:
            store(y, i, activated(which, load(x, i)))
            i += cuda.gridsize(1)

    pointers = ELEMENTS[x_element].pointer, ELEMENTS[y_element].pointer
    return Kernel(activation, (x_element, y_element), (types.int64, types.int32, *pointers))


def _choice(formulas: list, first: int = 0) -> Callable:
    """activated(which, x): the formula of number `which`, counted from `first`, on x, found by halving."""
    if len(formulas) == 1:
        (formula,) = formulas

        @device_function
        def activated(which, x):
            return formula(x)

        return activated
    half = len(formulas) // 2
    middle = first + half
    lower, upper = _choice(formulas[:half], first), _choice(formulas[half:], middle)

    @device_function
    def choose(which, x):
        if which < middle:
            return lower(which, x)
        return upper(which, x)

    return choose


def number_of(name: str) -> int:
    """The place of an activation among the formulas."""
    return list(_formulas(np.float32)).index(SAME.get(name, name))


@cache
def _formulas(number) -> dict[str, Callable]:
    """The formulas by name, in arithmetic of `number`, whose constants are of that type lest floats become doubles."""
    zero, half, one, two, three, four, six = map(number, (0, 0.5, 1, 2, 3, 4, 6))
    slope, root_half = number(0.2), number(math.sqrt(0.5))
    scale, scaled_alpha = number(SELU_SCALE), number(SELU_SCALE * SELU_ALPHA)

    @device_function
    def elu(x):
        return x if x > zero else expm1(x)

    @device_function
    def exponential(x):
        return exp(x)

    @device_function
    def gelu(x):
        return half * x * number(math.erfc(-x * root_half))

    @device_function
    def hard_shrink(x):
        return x if abs(x) > half else zero

    @device_function
    def hard_sigmoid(x):
        return clamped(x + three, zero, six) / six

    @device_function
    def hard_silu(x):
        return x * hard_sigmoid(x)

    @device_function
    def leaky_relu(x):
        return x if x > zero else slope * x

    @device_function
    def softplus(x):
        """log(1 + exp(x)), whose exponential does not overflow."""
        return x + log1p(exp(-x)) if x > zero else log1p(exp(x))

    @device_function
    def log_sigmoid(x):
        return -softplus(-x)

    @device_function
    def mish(x):
        return x * tanh(softplus(x))

    @device_function
    def selu(x):
        return scale * x if x > zero else scaled_alpha * expm1(x)

    @device_function
    def sigmoid(x):
        return one / (one + exp(-x))

    @device_function
    def silu(x):
        return x * sigmoid(x)

    @device_function
    def soft_shrink(x):
        return x - half if x > half else x + half if x < -half else zero

    @device_function
    def softsign(x):
        return x / (one + abs(x))

    @device_function
    def sparse_plus(x):
        return zero if x <= -one else (x + one) * (x + one) / four if x < one else x

    @device_function
    def sparse_sigmoid(x):
        return clamped((x + one) / two, zero, one)

    @device_function
    def squareplus(x):
        return (x + math.sqrt(x * x + four)) / two

    @device_function
    def tanh_itself(x):
        return tanh(x)

    @device_function
    def tanh_shrink(x):
        return x - tanh(x)

    return {
        "elu": elu, "exponential": exponential, "gelu": gelu, "hard_shrink": hard_shrink, "hard_sigmoid": hard_sigmoid,
        "hard_silu": hard_silu, "leaky_relu": leaky_relu, "log_sigmoid": log_sigmoid, "mish": mish, "selu": selu,
        "sigmoid": sigmoid, "silu": silu, "soft_shrink": soft_shrink, "softplus": softplus, "softsign": softsign,
        "sparse_plus": sparse_plus, "sparse_sigmoid": sparse_sigmoid, "squareplus": squareplus, "tanh": tanh_itself,
        "tanh_shrink": tanh_shrink,
    }  # fmt: skip
