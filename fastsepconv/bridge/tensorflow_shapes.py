"""What TensorFlow calls while it builds a graph: shape inference, one function an operation, compiled by Numba.

The C API lets a shape function see shapes but no integer attributes, so height and width stay unknown here; the
Python side knows more and sets it.
"""

from __future__ import annotations

import numpy as np

from ..kernels.cpu.jit import kernel
from . import tensorflow_capi as tf
from .tensorflow_tensors import failed

UNKNOWN = -1


@kernel
def _vector(context, size):
    """A new shape `[size]`."""
    return tf.vector_of(context, np.uint64(np.int64(size)))


@kernel
def _append(context, shape, size, status):
    """Adds one size at the end of `shape`."""
    last = _vector(context, size)
    tf.concatenate(context, shape, last, shape, status)
    tf.delete_shape(last)


@kernel
def _size(context, shape, axis):
    """A size of a shape of known rank, or UNKNOWN."""
    handle = tf.new_dimension()
    tf.shape_dim(context, shape, axis, handle)
    size = tf.dimension_value(handle) if tf.dimension_known(handle) != 0 else UNKNOWN
    tf.delete_dimension(handle)
    return size


@kernel
def _last_size(context, shape):
    rank = tf.shape_rank(context, shape) if tf.rank_known(context, shape) != 0 else 0
    return _size(context, shape, rank - 1) if rank > 0 else UNKNOWN


@kernel
def _read(context, index, rank, status):
    """Input `index`, held to `rank` unless that is UNKNOWN."""
    shape = tf.new_shape()
    tf.shape_input(context, index, shape, status)
    if rank != UNKNOWN and not failed(status):
        tf.with_rank(context, shape, rank, shape, status)
    return shape


@kernel
def _image_shape(context, channels, keep_sizes, status):
    """Output 0 is `[N,?,?,channels]`, or `[N,H,W,channels]` with the sizes of input 0."""
    shape = _read(context, 0, 4, status)
    if not failed(status):
        tf.subshape(context, shape, 0, 3 if keep_sizes else 1, shape, status)
        if not keep_sizes:
            _append(context, shape, UNKNOWN, status)
            _append(context, shape, UNKNOWN, status)
        _append(context, shape, channels, status)
        tf.shape_output(context, 0, shape, status)
    tf.delete_shape(shape)


@kernel
def pointwise(context, status):
    """[N,H,W,F]"""
    weights = _read(context, 1, UNKNOWN, status)
    filters = UNKNOWN if failed(status) else _last_size(context, weights)
    tf.delete_shape(weights)
    if not failed(status):
        _image_shape(context, filters, True, status)


@kernel
def depthwise(context, status):
    """[N,?,?,C*M]"""
    weights = _read(context, 1, 4, status)
    if failed(status):
        tf.delete_shape(weights)
        return
    channels, multiplier = _size(context, weights, 2), _size(context, weights, 3)
    tf.delete_shape(weights)
    filters = UNKNOWN if channels == UNKNOWN or multiplier == UNKNOWN else channels * multiplier
    _image_shape(context, filters, False, status)


@kernel
def separable(context, status):
    """[N,?,?,F]"""
    tf.delete_shape(_read(context, 1, 4, status))
    if failed(status):
        return
    mixing = _read(context, 2, UNKNOWN, status)
    filters = UNKNOWN if failed(status) else _last_size(context, mixing)
    tf.delete_shape(mixing)
    if not failed(status):
        _image_shape(context, filters, False, status)
