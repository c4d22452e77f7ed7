"""What TensorFlow calls: one function an operation and a direction, compiled by Numba, run without the GIL.

Each reads its inputs and its state, checks them, allocates the outputs and calls the kernel. Sizes are those of the
tensors that really came, whatever was known when the graph was made. What is wrong ends as a TensorFlow error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..kernels import geometry
from ..kernels.cpu import depthwise, pointwise, separable, threads
from ..kernels.cpu.jit import kernel
from ..kernels.cpu.memory import keep, view
from ..kernels.cpu.scratch import require
from ..kernels.geometry import Geometry
from . import tensorflow_capi as tf
from . import tensorflow_kept as kept
from .tensorflow_capi import INVALID_ARGUMENT, RESOURCE_EXHAUSTED
from .tensorflow_state import DILATIONS, PADDING, RELU, SAME, STRIDES, WANTED, WORDS

MAX_ELEMENTS = 2**59  # TensorFlow aborts on a shape whose product overflows
MAX_SPAN = 2**31 - 1
MESSAGE_BYTES = 512

_effective_size = kernel(geometry.effective_size)
_same_length = kernel(geometry.same_length)
_same_padding = kernel(geometry.same_padding)
_explicit_length = kernel(geometry.explicit_length)


class Tensor(NamedTuple):
    """An input: where its elements are, and its sizes aligned to the right, with ones in front."""

    data: int
    rank: int
    shape: tuple[int, int, int, int]


@intrinsic(prefer_literal=True)
def fail(typing_context, status, code, message, numbers):
    """Sets `status` to `code` with a literal `message`, its %lld filled in from a tuple of integers."""

    def codegen(context, builder, signature, arguments):
        long = ir.IntType(64)
        values = [
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(cgutils.unpack_tuple(builder, arguments[3]), signature.args[3], strict=True)
        ]
        space = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), MESSAGE_BYTES))
        buffer = builder.bitcast(space, cgutils.voidptr_t)
        cgutils.snprintf(builder, buffer, cgutils.intp_t(MESSAGE_BYTES), message.literal_value, *values)
        set_status = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [long, ir.IntType(32), long]), "TF_SetStatus"
        )
        code_value = context.cast(builder, arguments[1], signature.args[1], types.int32)
        builder.call(set_status, [arguments[0], code_value, builder.ptrtoint(buffer, long)])
        return context.get_dummy_value()

    return types.void(types.intp, code, message, numbers), codegen


@kernel
def failed(status):
    """Whether `status` holds an error."""
    return tf.get_code(status) != tf.OK


@kernel
def _size(handle, rank, back):
    return tf.dim(handle, rank - back) if rank >= back else 1


@kernel
def read_input(context, index, status):
    """Input `index`. TensorFlow holds the elements until the kernel returns, so the handle is let go at once."""
    slot = np.zeros(1, np.intp)
    tf.get_input(context, index, slot.ctypes.data, status)
    handle = slot[0]
    if failed(status):
        return Tensor(0, -1, (0, 0, 0, 0))
    rank = np.int64(tf.num_dims(handle))
    shape = (_size(handle, rank, 4), _size(handle, rank, 3), _size(handle, rank, 2), _size(handle, rank, 1))
    data = tf.tensor_data(handle)
    tf.delete_tensor(handle)
    return Tensor(data, rank, shape)  # type: ignore[arg-type]


@kernel
def read_bias(context, index, filters, status):
    """Address of the bias `[filters]`, 0 where there is none."""
    count = tf.num_inputs(context) - index
    if count == 0:
        return 0
    bias = read_input(context, index, status)
    if failed(status):
        return 0
    if count > 1 or bias.rank != 1 or bias.shape[3] != filters:
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `bias`. Expected one vector of %lld elements. "
            "Received: %lld of rank %lld and last size %lld",
            (filters, count, bias.rank, bias.shape[3]),
        )  # fmt: skip
    return bias.data


@kernel
def allocate(context, index, rank, shape, status):
    """Address of output `index`, made with the last `rank` sizes of `shape`."""
    dims = np.empty(4, np.int64)
    elements = 1
    for i in range(4):
        dims[i] = shape[i]
        if shape[i] > 0 and elements > MAX_ELEMENTS // shape[i]:
            fail(
                status, RESOURCE_EXHAUSTED,
                "The result of shape (%lld, %lld, %lld, %lld) is too large",
                (shape[0], shape[1], shape[2], shape[3]),
            )  # fmt: skip
            return 0
        elements *= shape[i]
    kind = tf.output_type(context, index)
    first = dims.ctypes.data + 8 * (4 - rank)
    handle = tf.allocate_output(context, index, kind, first, rank, 0, status)
    keep(dims)
    if failed(status):
        return 0
    data = tf.tensor_data(handle)
    tf.delete_tensor(handle)
    return data


@kernel
def allocate_gradient(state, context, index, rank, shape, status):
    """Address of gradient `index`; 0, and an empty output, where it is not wanted."""
    if failed(status):
        return 0
    if (state[WANTED] >> index) & 1:
        return allocate(context, index, rank, shape, status)
    allocate(context, index, 1, (1, 1, 1, 0), status)
    return 0


@kernel
def finish(context, status):
    """Hands an error to TensorFlow, if there is one, and ends `status`."""
    if failed(status):
        tf.context_failure(context, status)
    tf.delete_status(status)


@kernel
def out_of_memory(context):
    """The TensorFlow error for an exception in a kernel: memory for its own use could not be had."""
    status = tf.new_status()
    fail(status, RESOURCE_EXHAUSTED, "There is not enough memory to compute in", ())
    finish(context, status)


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
def lowest(dtype, state):
    """The lower bound of a node's results."""
    return dtype(0) if state[RELU] != 0 else dtype(-np.inf)


@kernel
def depthwise_forward(dtype, address, context):
    """x, depthwise_kernel, bias (at most one) -> y."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights = read_input(context, 0, status), read_input(context, 1, status)
    g = read_geometry(state, x, weights, status)
    filters = g.channels * g.multiplier
    bias = 0 if failed(status) else read_bias(context, 2, filters, status)
    shape = (g.batch, g.out_height, g.out_width, filters)
    y = 0 if failed(status) else allocate(context, 0, 4, shape, status)
    if not failed(status):
        depthwise.forward(
            dtype, g, x.data, weights.data, bias, y, lowest(dtype, state), dtype(np.inf), threads.current()
        )
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
    """x, pointwise_kernel, bias (at most one) -> y."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights = read_input(context, 0, status), read_input(context, 1, status)
    batch, height, width, depth = x.shape
    filters = weights.shape[3]
    require_rank_4(x, status)
    require_pointwise(weights, depth, status)
    bias = 0 if failed(status) else read_bias(context, 2, filters, status)
    y = 0 if failed(status) else allocate(context, 0, 4, (batch, height, width, filters), status)
    if not failed(status):
        panels = kept.panels_of(dtype, address, context, 1, weights.data, depth, filters, threads.current())
        require(pointwise.multiply(
            dtype, batch * height * width, depth, filters, x.data, weights.data, filters, 1, panels, bias, y,
            lowest(dtype, state), dtype(np.inf), threads.current(),
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
    """x, depthwise_kernel, pointwise_kernel, bias (at most one) -> y."""
    state = view(np.int64, address, WORDS)
    status = tf.new_status()
    x, weights, mixing = read_input(context, 0, status), read_input(context, 1, status), read_input(context, 2, status)
    g = read_geometry(state, x, weights, status)
    filters = mixing.shape[3]
    require_pointwise(mixing, g.channels * g.multiplier, status)
    bias = 0 if failed(status) else read_bias(context, 3, filters, status)
    shape = (g.batch, g.out_height, g.out_width, filters)
    y = 0 if failed(status) else allocate(context, 0, 4, shape, status)
    if not failed(status):
        depth = g.channels * g.multiplier
        panels = kept.panels_of(dtype, address, context, 2, mixing.data, depth, filters, threads.current())
        require(separable.try_forward(
            dtype, g, filters, x.data, weights.data, mixing.data, panels, bias, y,
            lowest(dtype, state), dtype(np.inf), threads.current(),
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
