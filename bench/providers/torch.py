"""PyTorch, eager, tensors in channels_last; weights are Parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from .. import data
from ..problems import FORWARD, Layer, Problem
from . import Unsupported


class Provider:
    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self.versions = {"torch": torch.__version__}

    def prepare(self, problem: Problem, folder: Path):
        if not isinstance(problem, Layer):
            raise Unsupported("raced on single layers only")
        dtype = getattr(torch, problem.dtype)
        arrays = {name: _images(array).to(dtype) for name, array in data.load_input(folder).items()}
        sets = [
            {name: _parameter(name, torch.from_numpy(array).to(dtype)) for name, array in weights.items()}
            for weights in data.load_weights(problem, folder)
        ]
        build = _forward_step if problem.mode == FORWARD else _backward_step
        window = _window(problem)
        steps = [build(window, weights, arrays) for weights in sets]
        return steps, lambda outputs: {
            name: _as_numpy(name, value) for name, value in zip(problem.outputs, outputs, strict=True)
        }


def _images(array: np.ndarray) -> torch.Tensor:
    """`[N,H,W,C]` memory seen as the `[N,C,H,W]` tensor that torch calls channels_last."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _parameter(name: str, tensor: torch.Tensor) -> torch.nn.Parameter:
    if name == "depthwise":
        tensor = tensor.permute(2, 3, 0, 1)  # [R,S,C,1] -> [C,1,R,S]
    elif name == "pointwise":
        tensor = tensor.permute(3, 2, 0, 1)  # [1,1,C,F] -> [F,C,1,1]
    if tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return torch.nn.Parameter(tensor)


def _as_numpy(name: str, tensor: torch.Tensor) -> np.ndarray:
    order = {"d_depthwise": (2, 3, 0, 1), "d_pointwise": (2, 3, 1, 0), "d_bias": (0,)}.get(name, (0, 2, 3, 1))
    return np.ascontiguousarray(tensor.detach().permute(order).float().numpy())


def _window(layer: Layer) -> tuple[tuple[int, ...], dict]:
    """The margins to put around an image, and the depthwise convolution's options, whose padding is alike on all sides.

    Margins are there only where SAME has more zeros behind the image than before it.
    """
    before, after = layer.padding
    options = {"stride": layer.strides, "dilation": layer.dilation, "groups": layer.channels}
    if before == after:
        return (), options | {"padding": before}
    return (before, after) * 2, options


def _apply(window, x, depthwise=None, pointwise=None, bias=None):
    if depthwise is not None:
        margins, options = window
        if margins:
            x = functional.pad(x, margins)
        x = functional.conv2d(x, depthwise, bias if pointwise is None else None, **options)
    return x if pointwise is None else functional.conv2d(x, pointwise, bias)


def _forward_step(window, weights, arrays):
    @torch.inference_mode()
    def forward():
        return (_apply(window, arrays["x"], **weights),)

    return forward


def _backward_step(window, weights, arrays):
    x, dy = arrays["x"].requires_grad_(), arrays["dy"]

    def backward():
        y = _apply(window, x, **weights)
        return y, *torch.autograd.grad(y, [x, *weights.values()], dy)

    return backward
