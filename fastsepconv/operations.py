"""The four operations, each in terms of what a backend's kernels offer.

An operation is made from checked arrays. It knows its output's shape, which gradients it has, and how to fill them.
`arrays` holds the arguments under their names; a pointwise kernel may be `[1,1,K,F]`, kernels get it as `[K,F]`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import checks, device_arrays, layout
from .kernels.geometry import Geometry

Arrays = dict[str, np.ndarray]
NO_CLAMP = (-np.inf, np.inf)


class Depthwise(NamedTuple):
    """Depthwise convolution."""

    g: Geometry

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[N,P,Q,C*M]."""
        return self.g.output_shape

    def forward(self, kernels, a: Arrays, y, clamp) -> None:
        """Fill y."""
        kernels.depthwise_forward(self.g, a["x"], a["depthwise_kernel"], a.get("bias"), y, clamp)

    def backward(self, kernels, a: Arrays, d: Arrays) -> None:
        """Fill the gradients d."""
        x, kernel, dy = a["x"], a["depthwise_kernel"], a["dy"]
        kernels.depthwise_backward(self.g, x, kernel, dy, d["x"], d["depthwise_kernel"], d["bias"])


class Pointwise(NamedTuple):
    """Pointwise convolution: a matrix product over the channels."""

    output_shape: tuple[int, ...]

    def forward(self, kernels, a: Arrays, y, clamp) -> None:
        """Fill y."""
        kernels.pointwise_forward(_rows(a["x"]), _matrix(a["pointwise_kernel"]), a.get("bias"), _rows(y), clamp)

    def backward(self, kernels, a: Arrays, d: Arrays) -> None:
        """Fill the gradients d."""
        x, kernel, dy = _rows(a["x"]), _matrix(a["pointwise_kernel"]), _rows(a["dy"])
        kernels.pointwise_backward(x, kernel, dy, _rows(d["x"]), _matrix(d["pointwise_kernel"]), d["bias"])


class Separable(NamedTuple):
    """Depthwise, then pointwise convolution, in one kernel."""

    g: Geometry
    output_shape: tuple[int, ...]

    def forward(self, kernels, a: Arrays, y, clamp) -> None:
        """Fill y."""
        pointwise = _matrix(a["pointwise_kernel"])
        kernels.separable_forward(self.g, a["x"], a["depthwise_kernel"], pointwise, a.get("bias"), y, clamp)

    def backward(self, kernels, a: Arrays, d: Arrays) -> None:
        """Fill the gradients d."""
        inputs = a["x"], a["depthwise_kernel"], _matrix(a["pointwise_kernel"]), a["dy"]
        targets = d["x"], d["depthwise_kernel"], _matrix(d["pointwise_kernel"]), d["bias"]
        kernels.separable_backward(self.g, *inputs, *targets)


class PointwiseDepthwise(NamedTuple):
    """Pointwise, then depthwise convolution, as the Xception tutorial draws it: the one kernel after the other."""

    g: Geometry  # of the depthwise step; its input is the pointwise step's output

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[N,P,Q,F*M]."""
        return self.g.output_shape

    def forward(self, kernels, a: Arrays, y, clamp) -> None:
        """Fill y."""
        mid = self._mid(kernels, a)
        kernels.depthwise_forward(self.g, mid, a["depthwise_kernel"], a.get("bias"), y, clamp)

    def backward(self, kernels, a: Arrays, d: Arrays) -> None:
        """Fill the gradients d; the middle is computed again."""
        mid = self._mid(kernels, a)
        d_mid = between(a["x"], self.g.input_shape)
        dy, kernel = a["dy"], a["depthwise_kernel"]
        kernels.depthwise_backward(self.g, mid, kernel, dy, d_mid, d["depthwise_kernel"], d["bias"])
        x, kernel = _rows(a["x"]), _matrix(a["pointwise_kernel"])
        kernels.pointwise_backward(x, kernel, _rows(d_mid), _rows(d["x"]), _matrix(d["pointwise_kernel"]), None)

    def _mid(self, kernels, a: Arrays) -> np.ndarray:
        mid = between(a["x"], self.g.input_shape)
        kernels.pointwise_forward(_rows(a["x"]), _matrix(a["pointwise_kernel"]), None, _rows(mid), NO_CLAMP)
        return mid


def between(x, shape: tuple[int, ...]):
    """Room for what lies between two steps, beside x; on a card, where halves stay halves, in their sums' dtype."""
    if isinstance(x, np.ndarray):
        return layout.empty(shape, x.dtype)
    return device_arrays.new(x, shape, "float64" if x.dtype.name == "float64" else "float32")


def _rows(images: np.ndarray) -> np.ndarray:
    """[N,H,W,C] as [N*H*W,C]."""
    return images.reshape(-1, images.shape[-1])


def _matrix(kernel: np.ndarray) -> np.ndarray:
    """[1,1,K,F] or [K,F] as [K,F]."""
    return kernel.reshape(kernel.shape[-2:])


def depthwise(arrays: Arrays, strides, padding, dilation_rate) -> Depthwise:
    """The depthwise convolution of these arrays."""
    x, kernel = arrays["x"], arrays["depthwise_kernel"]
    checks.size("depthwise_kernel", kernel, 2, x.shape[3], "the channels of `x`")
    return Depthwise(checks.geometry(x.shape, kernel.shape, strides, padding, dilation_rate))


def pointwise(arrays: Arrays) -> Pointwise:
    """The pointwise convolution of these arrays."""
    x, kernel = arrays["x"], arrays["pointwise_kernel"]
    checks.size("pointwise_kernel", kernel, -2, x.shape[3], "the channels of `x`")
    return Pointwise((*x.shape[:3], kernel.shape[-1]))


def separable(arrays: Arrays, strides, padding, dilation_rate, order) -> Separable | PointwiseDepthwise:
    """The separable convolution of these arrays, its steps in that order."""
    x, depthwise_kernel, pointwise_kernel = (arrays[name] for name in ("x", "depthwise_kernel", "pointwise_kernel"))
    channels, multiplier = depthwise_kernel.shape[2:]
    filters = pointwise_kernel.shape[-1]
    if checks.order(order) == "depthwise_pointwise":
        checks.size("depthwise_kernel", depthwise_kernel, 2, x.shape[3], "the channels of `x`")
        checks.size("pointwise_kernel", pointwise_kernel, -2, channels * multiplier, "the depthwise step's outputs")
        g = checks.geometry(x.shape, depthwise_kernel.shape, strides, padding, dilation_rate)
        return Separable(g, (g.batch, g.out_height, g.out_width, filters))
    checks.size("pointwise_kernel", pointwise_kernel, -2, x.shape[3], "the channels of `x`")
    checks.size("depthwise_kernel", depthwise_kernel, 2, filters, "the pointwise step's outputs")
    g = checks.geometry((*x.shape[:3], filters), depthwise_kernel.shape, strides, padding, dilation_rate)
    return PointwiseDepthwise(g)
