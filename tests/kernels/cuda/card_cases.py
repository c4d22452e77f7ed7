"""What is computed on a card: operations, shapes, numbers, and what comes out by the reference and by cuDNN."""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastsepconv.bench.problems import XCEPTION
from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import Geometry, resolve

from ... import on_card
from ...bridge.torch_cases import convolve
from ...on_card import torch
from .simulated.check_kernels import CASES

SAME = ((1, 1), "same", (1, 1))
ALIGNED = {
    "32 channels": ((2, 9, 8, 32), (3, 3), 1, 64, SAME),
    "96 channels": ((2, 19, 17, 96), (3, 3), 1, 64, SAME),
    "strides of two": ((2, 17, 16, 64), (3, 3), 1, 128, ((2, 2), "same", (1, 1))),
    "valid": ((1, 12, 13, 128), (3, 3), 1, 64, ((1, 1), "valid", (1, 1))),
    "five taps": ((1, 11, 12, 64), (5, 5), 1, 64, SAME),
    "dilation, aligned": ((1, 12, 12, 64), (3, 3), 1, 64, ((1, 1), "same", (2, 2))),
    "channels of 8, filters of 24": ((3, 7, 7, 8), (3, 3), 1, 24, SAME),
    "wide": ((1, 2, 130, 40), (3, 3), 1, 136, SAME),
}
# As batch 1 where an image is large, so that the reference takes seconds.
XCEPTIONS = {
    f"Xception {layer.shape}": (
        (1 if layer.size > 40 else 2, layer.size, layer.size, layer.channels), (3, 3), 1, layer.filters, SAME,
    )
    for layer in XCEPTION
}  # fmt: skip
SHAPES = {"ragged": CASES, "aligned": ALIGNED, "xception": XCEPTIONS}
ALL = {name: case for cases in SHAPES.values() for name, case in cases.items()}


class Problem(NamedTuple):
    """An operation on numbers of a dtype: what comes before the arrays, the arrays, and the sizes of the results."""

    operation: str  # "depthwise_forward" and so on
    dtype: str
    case: str
    before: tuple
    arrays: tuple  # of float64, each number one of the dtype; forward x, kernels, bias; backward x, kernels, dy

    @property
    def kind(self) -> str:
        return self.operation.partition("_")[0]

    @property
    def is_forward(self) -> bool:
        return self.operation.endswith("forward")

    def inputs(self, place):
        """The arrays as tensors of the dtype on the card."""
        return [place(torch.from_numpy(array).to(getattr(torch, self.dtype))) for array in self.arrays]

    @property
    def result_shapes(self) -> list[tuple[int, ...]]:
        return [array.shape for array in exact(self)]


def geometry(case) -> tuple[Geometry, int]:
    image, taps, multiplier, filters, window = case
    return resolve(image, (*taps, image[3], multiplier), *window), filters


def problem(operation: str, case: str, dtype: str) -> Problem:
    """The problem of that name; its numbers depend on the name alone."""
    kind, _, way = operation.partition("_")
    g, filters = geometry(ALL[case])
    middle = g.channels * (1 if kind == "pointwise" else g.multiplier)
    rows = g.batch * g.height * g.width
    shapes = {
        "depthwise": [g.input_shape, g.kernel_shape, (middle,)],
        "pointwise": [(rows, middle), (middle, filters), (filters,)],
        "separable": [g.input_shape, g.kernel_shape, (middle, filters), (filters,)],
    }[kind]
    out = {
        "depthwise": g.output_shape, "pointwise": (rows, filters), "separable": (*g.output_shape[:3], filters),
    }[kind]  # fmt: skip
    if way == "backward":
        shapes[-1] = out
    rng = np.random.default_rng(zlib.crc32(f"{operation} {case}".encode()))
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    rounded = [torch.from_numpy(array).to(getattr(torch, dtype)).double().numpy() for array in arrays]
    return Problem(operation, dtype, case, () if kind == "pointwise" else (g,), tuple(rounded))


@lru_cache(maxsize=2)
def _exact(operation: str, case: str, dtype: str) -> list[np.ndarray]:
    it = problem(operation, case, dtype)
    results = getattr(reference, operation)(*it.before, *it.arrays)
    return [results] if it.is_forward else list(results)


def exact(it: Problem) -> list[np.ndarray]:
    """The results by the reference, float64: [y], or the gradients of x, of the kernels and of the bias."""
    return _exact(it.operation, it.case, it.dtype)


def by_cudnn(it: Problem) -> list:
    """The same by PyTorch's convolutions on the card in the problem's dtype, without TensorFloat-32."""
    *operands, last = it.inputs(lambda tensor: tensor.to(on_card.DEVICE))
    leaves = [operand.requires_grad_() for operand in operands]
    if it.kind == "pointwise":
        window, images = {}, [leaves[0][None, None], leaves[1]]
    else:
        strides, padding, dilation = ALL[it.case][4]
        window, images = {"strides": strides, "padding": padding, "dilation_rate": dilation}, leaves
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True), _exact_products():
        y = convolve(it.kind, images, **window)
        y = y.reshape(y.shape[2:]) if it.kind == "pointwise" else y
        if it.is_forward:
            return [(y + last).detach()]
        gradients = torch.autograd.grad(y, leaves, last)
    return [*gradients, last.sum(tuple(range(last.ndim - 1)))]


@contextmanager
def _exact_products():
    """Within it products of matrices take no shortcuts."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
