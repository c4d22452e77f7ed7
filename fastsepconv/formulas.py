"""The float64 formulas of `kernels.reference` as a backend: the functions and arguments of `kernels.cpu`."""

from __future__ import annotations

import numpy as np

from .kernels import reference

NO_CLAMP = (-np.inf, np.inf)
FORWARD_HALVES: frozenset[str] = frozenset()  # the half types that forward passes take


def _forward(formula, arguments, out, clamp) -> None:
    with np.errstate(all="ignore"):
        out[...] = np.clip(formula(*arguments), *clamp)


def _after_relu(x):
    with np.errstate(all="ignore"):
        return np.where(x < 0, x.dtype.type(0), x)  # a NaN stays one


def _backward(formula, arguments, targets) -> None:
    with np.errstate(all="ignore"):
        for target, value in zip(targets, formula(*arguments), strict=True):
            if target is not None:
                target[...] = value


def depthwise_forward(g, x, kernel, bias, out, clamp=NO_CLAMP, relu_x=False) -> None:
    """Fill out `[N,P,Q,C*M]`."""
    x = _after_relu(x) if relu_x else x
    _forward(reference.depthwise_forward, (g, x, kernel, bias), out, clamp)


def depthwise_backward(g, x, kernel, dy, dx, d_kernel, d_bias) -> None:
    """Fill the gradients that are not None."""
    _backward(reference.depthwise_backward, (g, x, kernel, dy), (dx, d_kernel, d_bias))


def pointwise_forward(x, kernel, bias, out, clamp=NO_CLAMP) -> None:
    """Fill out `[rows,F]`."""
    _forward(reference.pointwise_forward, (x, kernel, bias), out, clamp)


def pointwise_backward(x, kernel, dy, dx, d_kernel, d_bias) -> None:
    """Fill the gradients that are not None."""
    _backward(reference.pointwise_backward, (x, kernel, dy), (dx, d_kernel, d_bias))


def separable_forward(g, x, depthwise_kernel, pointwise_kernel, bias, out, clamp=NO_CLAMP, relu_x=False) -> None:
    """Fill out `[N,P,Q,F]`."""
    x = _after_relu(x) if relu_x else x
    _forward(reference.separable_forward, (g, x, depthwise_kernel, pointwise_kernel, bias), out, clamp)


def separable_backward(g, x, depthwise_kernel, pointwise_kernel, dy, dx, d_depthwise, d_pointwise, d_bias) -> None:
    """Fill the gradients that are not None."""
    inputs, targets = (g, x, depthwise_kernel, pointwise_kernel, dy), (dx, d_depthwise, d_pointwise, d_bias)
    _backward(reference.separable_backward, inputs, targets)
