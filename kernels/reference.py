"""The specification: every operation and every gradient in plain float64 NumPy, the formula and nothing else.

The fast kernels are held against these functions. Arrays are channels-last; letters as in `geometry`.
Whatever real dtype comes in, float64 comes out.
"""

from __future__ import annotations

import numpy as np

from .geometry import Geometry


def _tap_range(tap: int, dilation: int, stride: int, pad: int, size: int, out: int) -> tuple[int, int, int]:
    """Output positions whose tap lies inside the image, as (first, past the last), and the first's input index."""
    offset = tap * dilation - pad
    first = max(0, -(offset // stride))  # the smallest i with i*stride + offset >= 0
    last = min(out, (size - 1 - offset) // stride + 1)
    return first, max(first, last), first * stride + offset


def _taps(g: Geometry):
    """For each tap inside the image: ((r, s), slice of the input, slice of the output)."""
    for r in range(g.kernel_height):
        p0, p1, h0 = _tap_range(r, g.dilation_height, g.stride_height, g.pad_top, g.height, g.out_height)
        for s in range(g.kernel_width):
            q0, q1, w0 = _tap_range(s, g.dilation_width, g.stride_width, g.pad_left, g.width, g.out_width)
            if p1 == p0 or q1 == q0:
                continue
            rows = slice(h0, h0 + (p1 - p0 - 1) * g.stride_height + 1, g.stride_height)
            columns = slice(w0, w0 + (q1 - q0 - 1) * g.stride_width + 1, g.stride_width)
            yield (r, s), np.s_[:, rows, columns], np.s_[:, p0:p1, q0:q1]


def depthwise_forward(g: Geometry, x, kernel, bias=None) -> np.ndarray:
    """y[n,p,q,c*M+m] = bias[c*M+m] + sum over r, s of x[n, p*sh+r*dh-top, q*sw+s*dw-left, c] * kernel[r,s,c,m]

    x `[N,H,W,C]`, kernel `[R,S,C,M]`, bias `[C*M]` -> y `[N,P,Q,C*M]` float64.
    """
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y = np.zeros((g.batch, g.out_height, g.out_width, g.channels, g.multiplier))
    for tap, source, target in _taps(g):
        y[target] += x[source][..., None] * kernel[tap]
    y = y.reshape(g.output_shape)
    return y if bias is None else y + np.asarray(bias, np.float64)


def depthwise_backward(g: Geometry, x, kernel, dy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of `depthwise_forward`, dy `[N,P,Q,C*M]`: d_x `[N,H,W,C]`, d_kernel `[R,S,C,M]`, d_bias `[C*M]`.

    d_x[n,h,w,c]      = sum over r, s, m of dy[n,p,q,c*M+m] * kernel[r,s,c,m], (p, q) the pixel with (h, w) at (r, s)
    d_kernel[r,s,c,m] = sum over n, p, q of dy[n,p,q,c*M+m] * x[n, p*sh+r*dh-top, q*sw+s*dw-left, c]
    d_bias[c*M+m]     = sum over n, p, q of dy[n,p,q,c*M+m]
    """
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    split = dy.reshape(*dy.shape[:3], g.channels, g.multiplier)
    dx, d_kernel = np.zeros(g.input_shape), np.zeros(g.kernel_shape)
    for tap, source, target in _taps(g):
        dx[source] += (split[target] * kernel[tap]).sum(-1)
        d_kernel[tap] = (split[target] * x[source][..., None]).sum((0, 1, 2))
    return dx, d_kernel, dy.sum((0, 1, 2))


def pointwise_forward(x, kernel, bias=None) -> np.ndarray:
    """y[...,f] = bias[f] + sum over k of x[...,k] * kernel[k,f], with x `[...,K]`, kernel `[K,F]`, bias `[F]`."""
    y = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


def pointwise_backward(x, kernel, dy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of `pointwise_forward`, dy `[...,F]`: d_x = dy.kernel^T, d_kernel = x^T.dy, d_bias = sum of dy."""
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    rows, columns = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ kernel.T, rows.T @ columns, columns.sum(0)


def separable_forward(g: Geometry, x, depthwise_kernel, pointwise_kernel, bias=None) -> np.ndarray:
    """`pointwise_forward(depthwise_forward(x))`: x `[N,H,W,C]`, kernels `[R,S,C,M]` and `[C*M,F]` -> `[N,P,Q,F]`."""
    return pointwise_forward(depthwise_forward(g, x, depthwise_kernel), pointwise_kernel, bias)


def separable_backward(g: Geometry, x, depthwise_kernel, pointwise_kernel, dy):
    """The gradients of `separable_forward` for dy `[N,P,Q,F]`: (d_x, d_depthwise, d_pointwise, d_bias)."""
    mid = depthwise_forward(g, x, depthwise_kernel)
    d_mid, d_pointwise, d_bias = pointwise_backward(mid, pointwise_kernel, dy)
    dx, d_depthwise, _ = depthwise_backward(g, x, depthwise_kernel, d_mid)
    return dx, d_depthwise, d_pointwise, d_bias
