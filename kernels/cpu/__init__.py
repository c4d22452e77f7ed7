"""The CPU kernels on NumPy arrays: C-contiguous, channels-last, one dtype, checked by the caller.

The dtype is float32 or float64, forward also bfloat16. A module an operation; each is handed raw addresses, so that one
compiled function serves arrays and tensors alike. `clamp` is a fused activation: (low, high) bounds of y, (0, inf) for
relu; `relu_x` asks for max(x, 0) instead of x. NaN passes both.
"""

from __future__ import annotations

import numpy as np

from ..geometry import Geometry
from . import depthwise, pointwise, separable, threads
from .simd import BFLOAT16
from .tiles import MULTIPLIES_BFLOAT16

UNBOUNDED = (-np.inf, np.inf)
# The half types that forward passes are handed as they are. Without instructions for them, float32 is faster.
FORWARD_HALVES = frozenset({"bfloat16"} if MULTIPLIES_BFLOAT16 else ())


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]  # ctypes.data takes three times as long


def _scalar_type(array: np.ndarray) -> type[np.generic]:
    kind = array.dtype.type
    return kind if kind in (np.float32, np.float64) else BFLOAT16


def _bounds(dtype: type[np.generic], *bounds: float) -> tuple[np.floating, ...]:
    return tuple(map(np.float64 if dtype is np.float64 else np.float32, bounds))


def _lowest(relu_x: bool) -> float:
    return 0.0 if relu_x else -np.inf


def _threads() -> int:
    threads.ensure_started()
    return threads.get_num_threads()


def depthwise_forward(g: Geometry, x, kernel, bias, out, clamp=UNBOUNDED, relu_x=False) -> None:
    """Fills out `[N,P,Q,C*M]` from x `[N,H,W,C]`, kernel `[R,S,C,M]`, bias `[C*M]` or None."""
    dtype = _scalar_type(out)
    arrays = map(_address, (x, kernel, bias, out))
    depthwise.forward(dtype, g, *arrays, *_bounds(dtype, _lowest(relu_x), *clamp), _threads())


def depthwise_backward(g: Geometry, x, kernel, dy, dx, d_kernel, d_bias) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[N,P,Q,C*M]`."""
    arrays = map(_address, (x, kernel, dy, dx, d_kernel, d_bias))
    depthwise.backward(_scalar_type(dy), g, *arrays, _threads())


def pointwise_forward(x, kernel, bias, out, clamp=UNBOUNDED) -> None:
    """Fills out `[rows,F]` from x `[rows,K]`, kernel `[K,F]`, bias `[F]` or None."""
    dtype = _scalar_type(out)
    arrays = map(_address, (x, kernel, bias, out))
    pointwise.forward(dtype, x.shape[0], *kernel.shape, *arrays, *_bounds(dtype, *clamp), _threads())


def pointwise_backward(x, kernel, dy, dx, d_kernel, d_bias) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[rows,F]`."""
    arrays = map(_address, (x, kernel, dy, dx, d_kernel, d_bias))
    pointwise.backward(_scalar_type(dy), x.shape[0], *kernel.shape, *arrays, _threads())


def separable_forward(
    g: Geometry, x, depthwise_kernel, pointwise_kernel, bias, out, clamp=UNBOUNDED, relu_x=False
) -> None:
    """Fills out `[N,P,Q,F]` from x `[N,H,W,C]`, kernels `[R,S,C,M]` and `[C*M,F]`, bias `[F]` or None."""
    dtype = _scalar_type(out)
    arrays = map(_address, (x, depthwise_kernel, pointwise_kernel, bias, out))
    filters = pointwise_kernel.shape[1]
    separable.forward(dtype, g, filters, *arrays, *_bounds(dtype, _lowest(relu_x), *clamp), _threads())


def separable_backward(
    g: Geometry, x, depthwise_kernel, pointwise_kernel, dy, dx, d_depthwise, d_pointwise, d_bias
) -> None:
    """Fills dx, d_depthwise, d_pointwise and d_bias, each unless None, from dy `[N,P,Q,F]`."""
    arrays = map(_address, (x, depthwise_kernel, pointwise_kernel, dy, dx, d_depthwise, d_pointwise, d_bias))
    filters = pointwise_kernel.shape[1]
    separable.backward(_scalar_type(dy), g, filters, *arrays, _threads())
