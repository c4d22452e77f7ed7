"""A node's inputs and outputs as its compiled kernel finds and makes them, and the errors that it ends with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..kernels.cpu.huge_pages import ask_for_huge_pages
from ..kernels.cpu.jit import kernel
from ..kernels.cpu.memory import keep
from . import tensorflow_capi as tf
from .tensorflow_capi import INVALID_ARGUMENT, RESOURCE_EXHAUSTED
from .tensorflow_state import RESIDUALS, WANTED

MAX_ELEMENTS = 2**59  # TensorFlow aborts on a shape whose product overflows
MESSAGE_BYTES = 512


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
def read_bias(state, context, index, filters, status):
    """Address of the bias `[filters]`, 0 where there is none."""
    count = tf.num_inputs(context) - state[RESIDUALS] - index
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
def read_residual(state, context, shape, status):
    """Address of the residual, the last input, of the output's shape; 0 where there is none."""
    if failed(status) or state[RESIDUALS] == 0:
        return 0
    residual = read_input(context, tf.num_inputs(context) - 1, status)
    if not failed(status) and (state[RESIDUALS] > 1 or residual.rank != 4 or residual.shape != shape):
        fail(
            status, INVALID_ARGUMENT,
            "Invalid value for argument `residual`. Expected one of shape (%lld, %lld, %lld, %lld), the output's. "
            "Received: %lld of %lld dimensions, shape (%lld, %lld, %lld, %lld)",
            (
                shape[0], shape[1], shape[2], shape[3], state[RESIDUALS], residual.rank,
                residual.shape[0], residual.shape[1], residual.shape[2], residual.shape[3],
            ),
        )  # fmt: skip
    return residual.data


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
    data, size = tf.tensor_data(handle), tf.byte_size(handle)
    tf.delete_tensor(handle)
    ask_for_huge_pages(data, size)
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
