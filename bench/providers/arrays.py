"""Our functions on NumPy arrays, with an output of their own at each call."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy

import fastsepconv

from .. import data
from ..problems import FORWARD, Layer, Problem
from . import Unsupported


class Provider:
    def __init__(self, threads: int):
        fastsepconv.set_num_threads(threads)
        self.versions = {
            "fastsepconv": fastsepconv.__version__,
            "numba": numba.__version__,
            "numpy": numpy.__version__,
        }

    def prepare(self, problem: Problem, folder: Path):
        if not isinstance(problem, Layer):
            raise Unsupported("arrays have no networks")
        arrays = data.load_input(folder)
        steps = [_step(problem, weights, **arrays) for weights in data.load_weights(problem, folder)]
        return steps, lambda outputs: dict(zip(problem.outputs, outputs, strict=True))


def _step(layer: Layer, weights, x, dy=None):
    kernels = [weights[name] for name in ("depthwise", "pointwise") if name in weights]
    bias = weights.get("bias")
    window = {"strides": layer.strides, "padding": "same", "dilation_rate": layer.dilation}
    options = {} if layer.op == "pointwise" else window
    forward = getattr(fastsepconv, f"{layer.op}_conv2d")
    gradients = getattr(fastsepconv, f"{layer.op}_conv2d_grad")
    if layer.mode == FORWARD:
        return lambda: (forward(x, *kernels, bias, **options),)

    def backward():
        y = forward(x, *kernels, bias, **options)
        grads = gradients(x, *kernels, dy, **options)
        return y, *(grads if layer.bias else grads[:-1])

    return backward
