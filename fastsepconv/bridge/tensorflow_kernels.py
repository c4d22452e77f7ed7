"""What TensorFlow calls: one function an operation and a direction, compiled by Numba, run without the GIL.

Each reads its inputs and its state, checks them, allocates the outputs and calls the kernel. Sizes are those of the
tensors that really came, whatever was known when the graph was made. What is wrong ends as a TensorFlow error.
"""

from __future__ import annotations

import numpy as np

from ..kernels import geometry
from ..kernels.cpu import depthwise, pointwise, separable, threads
from ..kernels.cpu.jit import kernel
from ..kernels.cpu.memory import view
from ..kernels.cpu.scratch import require
from ..kernels.cpu.simd import infinity
from ..kernels.geometry import Geometry
from . import tensorflow_capi as tf
from . import tensorflow_kept as kept
from .tensorflow_capi import INVALID_ARGUMENT
from .tensorflow_state import DILATIONS, PADDING, RELU, RELU_X, SAME, STRIDES, WORDS
from .tensorflow_tensors import (
    allocate,
    allocate_gradient,
    fail,
    failed,
    finish,
    read_bias,
    read_input,
    read_residual,
)

MAX_SPAN = 2**31 - 1

_effective_size = kernel(geometry.effective_size)
_same_length = kernel(geometry.same_length)
_same_padding = kernel(geometry.same_padding)
_explicit_length = kernel(geometry.explicit_length)


@kernel
def require_rank_4(x, status):
    """An error unless x is `[N,H,W,C]`."""
    if x.rank != 4:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `x`. Expected 4 dimensions. Received: %lld dimensions", (x.rank,),
        )  # fmt: skip


@kernel
def _axis(state, axis, size, taps):
    """(output length, zeros before) along one axis; the length is -1 where TensorFlow too calls it negative."""
    stride, span = state[STRIDES + axis], _effective_size(taps, state[DILATIONS + axis])
    before, after = state[PADDING + 2 * axis], state[PADDING + 2 * axis + 1]
    if span > MAX_SPAN:
        return -1, before
    if state[SAME] != 0:
        out = _same_length(size, stride)
        return out, _same_padding(size, out, span, stride)
    if size + before + after - span + 2 * stride <= 0:
        return -1, before
    return _explicit_length(size, span, stride, before, after), before


@kernel
def read_geometry(state, x, weights, status):
    """The Geometry of x `[N,H,W,C]` and a depthwise kernel `[R,S,C,M]`."""
    batch, height, width, channels = x.shape
    taps_h, taps_w, kernel_channels, multiplier = weights.shape
    p, top = _axis(state, 0, height, taps_h)
    q, left = _axis(state, 1, width, taps_w)
    require_rank_4(x, status)
    if failed(status):
        pass
    elif weights.rank != 4 or min(weights.shape) < 1:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `depthwise_kernel`. Expected 4 dimensions, none of them empty. "
            "Received: %lld dimensions, shape (%lld, %lld, %lld, %lld)",
            (weights.rank, taps_h, taps_w, kernel_channels, multiplier),
        )  # fmt: skip
    elif channels != kernel_channels:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `depthwise_kernel`. Expected %lld input channels, as x has. "
            "Received: %lld, in shape (%lld, %lld, %lld, %lld)",
            (channels, kernel_channels, taps_h, taps_w, kernel_channels, multiplier),
        )  # fmt: skip
    elif p < 0 or q < 0:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `depthwise_kernel`. Expected a kernel that fits into the padded image. "
            "Received: a kernel of %lld x %lld taps for an image of %lld x %lld pixels",
            (taps_h, taps_w, height, width),
        )  # fmt: skip
    return Geometry(
        batch, height, width, channels, multiplier, taps_h, taps_w,
        state[STRIDES], state[STRIDES + 1], state[DILATIONS], state[DILATIONS + 1], top, left, p, q,
    )  # fmt: skip


@kernel
def require_pointwise(weights, depth, status):
    """An error unless a pointwise kernel is `[1,1,depth,F]` or `[depth,F]`, with F of at least 1."""
    one, another, kernel_depth, filters = weights.shape
    if failed(status):
        return
    if (weights.rank != 4 and weights.rank != 2) or one != 1 or another != 1 or kernel_depth != depth or filters < 1:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `pointwise_kernel`. Expected shape (1, 1, %lld, filters). "
            "Received: %lld dimensions, shape (%lld, %lld, %lld, %lld)",
            (depth, weights.rank, one, another, kernel_depth, filters),
        )  # fmt: skip


@kernel
def require_dy(dy, shape, status):
    """An error unless the output's gradient has the output's shape."""
    if failed(status):
        return
    if dy.rank != 4 or dy.shape != shape:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `dy`. Expected shape (%lld, %lld, %lld, %lld), that of the output. "
            "Received: %lld dimensions, shape (%lld, %lld, %lld, %lld)",
            (
                shape[0], shape[1], shape[2], shape[3],
                dy.rank, dy.shape[0], dy.shape[1], dy.shape[2], dy.shape[3],
            ),
        )  # fmt: skip


@kernel
def lowest(dtype, relu):
    """The lower bound of values that pass a ReLU, or that do not."""
    return np.float32(0) if relu != 0 else -infinity(dtype)


@kernel
def depthwise_forward(dtype, address, context):
    """x, depthwise_kernel, bias (at most one) -> y."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights = read_input(context, 0, status), read_input(context, 1, status)
    g = read_geometry(state, x, weights, status)
    filters = g.channels * g.multiplier
    bias = 0 if failed(status) else read_bias(state, context, 2, filters, status)
    shape = (g.batch, g.out_height, g.out_width, filters)
    y = 0 if failed(status) else allocate(context, 0, 4, shape, status)
    if not failed(status):
        depthwise.convolve(
            dtype, g, x.data, lowest(dtype, state[RELU_X]), weights.data, bias, y,
            lowest(dtype, state[RELU]), infinity(dtype), threads.current(),
        )  # fmt: skip
    finish(context, status)


@kernel
def depthwise_backward(dtype, address, context):
    """x, depthwise_kernel, dy -> d_x, d_kernel, d_bias."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights, dy = read_input(context, 0, status), read_input(context, 1, status), read_input(context, 2, status)
    g = read_geometry(state, x, weights, status)
    filters = g.channels * g.multiplier
    require_dy(dy, (g.batch, g.out_height, g.out_width, filters), status)
    d_x = allocate_gradient(state, context, 0, 4, x.shape, status)
    d_kernel = allocate_gradient(state, context, 1, 4, weights.shape, status)
    d_bias = allocate_gradient(state, context, 2, 1, (1, 1, 1, filters), status)
    if not failed(status):
        depthwise.backward(dtype, g, x.data, weights.data, dy.data, d_x, d_kernel, d_bias, threads.current())
    finish(context, status)


@kernel
def pointwise_forward(dtype, address, context):
    """x, pointwise_kernel, bias, residual (at most one of each) -> y."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights = read_input(context, 0, status), read_input(context, 1, status)
    batch, height, width, depth = x.shape
    filters = weights.shape[3]
    require_rank_4(x, status)
    require_pointwise(weights, depth, status)
    bias = 0 if failed(status) else read_bias(state, context, 2, filters, status)
    shape = (batch, height, width, filters)
    residual = read_residual(state, context, shape, status)
    y = 0 if failed(status) else allocate(context, 0, 4, shape, status)
    if not failed(status):
        panels = kept.panels_of(dtype, address, context, 1, weights.data, depth, filters, threads.current())
        require(pointwise.multiply(
            dtype, batch * height * width, depth, filters, x.data, weights.data, filters, 1, panels, bias, residual,
            y, lowest(dtype, state[RELU]), infinity(dtype), threads.current(),
        ))  # fmt: skip
    finish(context, status)


@kernel
def pointwise_backward(dtype, address, context):
    """x, pointwise_kernel, dy -> d_x, d_kernel, d_bias."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights, dy = read_input(context, 0, status), read_input(context, 1, status), read_input(context, 2, status)
    batch, height, width, depth = x.shape
    filters = weights.shape[3]
    require_rank_4(x, status)
    require_pointwise(weights, depth, status)
    require_dy(dy, (batch, height, width, filters), status)
    d_x = allocate_gradient(state, context, 0, 4, x.shape, status)
    d_kernel = allocate_gradient(state, context, 1, weights.rank, weights.shape, status)
    d_bias = allocate_gradient(state, context, 2, 1, (1, 1, 1, filters), status)
    if not failed(status):
        pointwise.backward(
            dtype, batch * height * width, depth, filters,
            x.data, weights.data, dy.data, d_x, d_kernel, d_bias, threads.current(),
        )  # fmt: skip
    finish(context, status)


@kernel
def separable_forward(dtype, address, context):
    """x, depthwise_kernel, pointwise_kernel, bias, residual (at most one of each) -> y."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights, mixing = read_input(context, 0, status), read_input(context, 1, status), read_input(context, 2, status)
    g = read_geometry(state, x, weights, status)
    filters = mixing.shape[3]
    require_pointwise(mixing, g.channels * g.multiplier, status)
    bias = 0 if failed(status) else read_bias(state, context, 3, filters, status)
    shape = (g.batch, g.out_height, g.out_width, filters)
    residual = read_residual(state, context, shape, status)
    y = 0 if failed(status) else allocate(context, 0, 4, shape, status)
    if not failed(status):
        depth = g.channels * g.multiplier
        panels = kept.panels_of(dtype, address, context, 2, mixing.data, depth, filters, threads.current())
        require(separable.try_forward(
            dtype, g, filters, x.data, lowest(dtype, state[RELU_X]), weights.data, mixing.data, panels, bias, residual,
            y, lowest(dtype, state[RELU]), infinity(dtype), threads.current(),
        ))  # fmt: skip
    finish(context, status)


@kernel
def separable_backward(dtype, address, context):
    """x, depthwise_kernel, pointwise_kernel, dy -> d_x, d_depthwise, d_pointwise, d_bias."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights = read_input(context, 0, status), read_input(context, 1, status)
    mixing, dy = read_input(context, 2, status), read_input(context, 3, status)
    g = read_geometry(state, x, weights, status)
    filters = mixing.shape[3]
    require_pointwise(mixing, g.channels * g.multiplier, status)
    require_dy(dy, (g.batch, g.out_height, g.out_width, filters), status)
    d_x = allocate_gradient(state, context, 0, 4, x.shape, status)
    d_depthwise = allocate_gradient(state, context, 1, 4, weights.shape, status)
    d_pointwise = allocate_gradient(state, context, 2, mixing.rank, mixing.shape, status)
    d_bias = allocate_gradient(state, context, 3, 1, (1, 1, 1, filters), status)
    if not failed(status):
        separable.backward(
            dtype, g, filters, x.data, weights.data, mixing.data, dy.data,
            d_x, d_depthwise, d_pointwise, d_bias, threads.current(),
        )  # fmt: skip
    finish(context, status)
