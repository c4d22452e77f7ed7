"""What the others are held against: the float64 formulas for a layer, stock Keras in float64 for a network.

It also writes the ONNX models of a problem, so that the runtimes that take them need no other library.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import resolve

from .. import data
from ..problems import FORWARD, Layer, Network, Problem


class Provider:
    def __init__(self, threads: int):
        self.versions = {"numpy": np.__version__}

    def prepare(self, problem: Problem, folder: Path):
        if not isinstance(problem, Layer):
            return self._network(problem, folder)
        sets = data.load_weights(problem, folder)
        _write_onnx(problem, folder, sets)
        arrays = data.load_input(folder)
        used = sets[:1] if len(sets) == 1 else [sets[0], sets[-1]]
        steps = [lambda weights=weights: _layer(problem, weights, **arrays) for weights in used]
        return steps, lambda outputs: dict(zip(problem.outputs, outputs, strict=True))

    def _network(self, problem: Network, folder: Path):
        from .. import networks

        return networks.reference_step(problem, folder)


def _layer(layer: Layer, weights, x, dy=None):
    """y, and for "backward" the gradients, in the order of `layer.outputs`."""
    kernels, bias = [weights[name] for name in weights if name != "bias"], weights.get("bias")
    if layer.op != "depthwise":
        kernels[-1] = kernels[-1][0, 0]
    strides, dilation = (layer.strides,) * 2, (layer.dilation,) * 2
    geometry = () if layer.op == "pointwise" else (resolve(x.shape, kernels[0].shape, strides, "same", dilation),)
    y = getattr(reference, f"{layer.op}_forward")(*geometry, x, *kernels, bias)
    if layer.mode == FORWARD:
        return (y,)
    values = getattr(reference, f"{layer.op}_backward")(*geometry, x, *kernels, dy)
    names = ["d_x", *(f"d_{name}" for name in weights if name != "bias"), "d_bias"]
    gradients = dict(zip(names, values, strict=True))
    if layer.op != "depthwise":
        gradients["d_pointwise"] = gradients["d_pointwise"][None, None]
    return y, *(gradients[name] for name in layer.outputs[1:])


def _write_onnx(layer: Layer, folder: Path, sets) -> None:
    if layer.mode != FORWARD:
        return
    try:
        from .. import onnx_models
    except ImportError:
        return
    for index, weights in enumerate(sets):
        onnx_models.save(onnx_models.layer_model(layer, weights), folder, index)
