"""The convolutions that the PyTorch bridge's tests run, and the same from PyTorch's own operations.

Whoever imports this module is skipped where PyTorch is not installed.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fastsepconv.kernels.geometry import resolve

from ..tolerances import assert_close
from .windows import WINDOWS, operand_shapes, window_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-torch` makes an environment with it")

from fastsepconv.bridge import torch as bridge  # noqa: E402

KINDS = {
    "separable": bridge.separable_conv2d,
    "depthwise": bridge.depthwise_conv2d,
    "pointwise": bridge.pointwise_conv2d,
}
CASES = [
    pytest.param(kind, case, id=f"{kind}-{case}")
    for kind in KINDS
    for case in (WINDOWS if kind != "pointwise" else ["plain"])
]


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is full of NaN, so that what no kernel fills shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(rng, kind, image, taps, multiplier, filters, dtype=torch.float64):
    """x, the kernels and the bias of a convolution, as leaves that want a gradient."""
    shapes = operand_shapes(kind, image, taps, multiplier, filters)
    return [torch.tensor(rng.standard_normal(shape)).to(dtype).requires_grad_() for shape in shapes]


def twins(tensors, dtype=torch.float64):
    """The same leaves once more, in another dtype."""
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def gradients(function, inputs, dy=None):
    """`function`'s result for the inputs, and the gradient of each for dy (of ones, if none is given)."""
    y = function(*inputs)
    return y, torch.autograd.grad(y, inputs, torch.ones_like(y) if dy is None else dy)


def assert_output_and_gradients(rng, kind, case, dtype):
    """A convolution and the gradients of all its operands are those of PyTorch's own operations in float64."""
    *sizes, window = WINDOWS[case]
    window = window_of(kind, window)
    inputs = operands(rng, kind, *sizes, getattr(torch, dtype))
    exact = twins(inputs)
    dy = torch.tensor(rng.standard_normal(convolve(kind, exact[:-1], **window).shape)).to(inputs[0].dtype)
    y, ours = gradients(lambda *t: KINDS[kind](*t, **window), inputs, dy)
    true_y, true = gradients(lambda *t: convolve(kind, t[:-1], t[-1], **window), exact, dy.double())
    assert_close("y", array(y), array(true_y))
    for name, gradient, true_gradient in zip("xabc", ours, true, strict=False):
        assert gradient.dtype == inputs[0].dtype
        assert_close(name, array(gradient), array(true_gradient))
    assert len(ours) == len(inputs)


def array(tensor) -> np.ndarray:
    """The tensor as an array of its own dtype."""
    if tensor.dtype is torch.bfloat16:
        return tensor.detach().float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def convolve(kind, operands, bias=None, strides=(1, 1), padding="valid", dilation_rate=(1, 1)):
    """`kind` is "separable", "depthwise" or "pointwise"; the operands are x and the kernels, channels-last."""
    x, *kernels = operands
    y = x.permute(0, 3, 1, 2)
    if kind != "pointwise":
        y = _depthwise(y, kernels[0], resolve(tuple(x.shape), tuple(kernels[0].shape), strides, padding, dilation_rate))
    if kind != "depthwise":
        matrix = kernels[-1].reshape(kernels[-1].shape[-2:])
        y = torch.nn.functional.conv2d(y, matrix.T[:, :, None, None])
    y = y.permute(0, 2, 3, 1)
    return y if bias is None else y + bias


def _depthwise(x, kernel, g):
    bottom = (g.out_height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height + 1 - g.height - g.pad_top
    right = (g.out_width - 1) * g.stride_width + (g.kernel_width - 1) * g.dilation_width + 1 - g.width - g.pad_left
    padded = torch.nn.functional.pad(x, (g.pad_left, max(0, right), g.pad_top, max(0, bottom)))
    filters = kernel.permute(2, 3, 0, 1).reshape(g.channels * g.multiplier, 1, g.kernel_height, g.kernel_width)
    y = torch.nn.functional.conv2d(
        padded,
        filters,
        stride=(g.stride_height, g.stride_width),
        dilation=(g.dilation_height, g.dilation_width),
        groups=g.channels,
    )
    return y[:, :, : g.out_height, : g.out_width]
