"""Pointwise kernels that are constants of a frozen graph: packed at a node's first run, and kept as long as the node.

A variable's kernel is packed at each run. It would not do to keep it as long as its address stays the same: who assigns
to it a tensor that lies in the memory of an array, and then the next one in the same memory, changes the values where
they are. A constant belongs to the graph.
"""

from __future__ import annotations

import numpy as np

from ..kernels.cpu import atomics, gemm, scratch
from ..kernels.cpu.atomics import WORD_SIZE
from ..kernels.cpu.jit import kernel
from ..kernels.cpu.memory import size_of, view
from . import tensorflow_capi as tf
from . import tensorflow_state as word


@kernel
def panels_of(dtype, state, context, index, source, depth, filters, threads):
    """The address of input `index`, a kernel `[depth,filters]` at `source`, in panels as `gemm.pack` makes them.

    0 where the node keeps none, or another thread packs it just now: then the caller packs for itself. `state` is an
    address. Its KEEP word says whether the input is a constant (`tensorflow_freeze`); if it is computed from one at
    each run, it lies elsewhere than the tensor that the node holds on to, and nothing is found for it.
    """
    words = view(np.int64, state, word.WORDS)
    if words[word.KEEP] == 0:
        return 0
    panels = atomics.load(state + word.PANELS * WORD_SIZE)
    if panels == 0:
        if atomics.exchange(state + word.LOCK * WORD_SIZE, 1) != 0:  # taken for good: what cannot be packed never is
            return 0
        panels = _pack(dtype, words, context, index, source, depth, filters, threads)
        atomics.store(state + word.PANELS * WORD_SIZE, panels)
    return panels if words[word.ADDRESS] == source else 0


@kernel
def _pack(dtype, words, context, index, source, depth, filters, threads):
    """What `panels_of` keeps; 0 where there is no memory, or the tensor cannot be held on to."""
    status = tf.new_status()
    tf.get_input(context, index, words[word.TENSOR :].ctypes.data, status)
    held = tf.get_code(status) == tf.OK
    tf.delete_status(status)
    if not held:
        words[word.TENSOR] = 0
        return 0
    panels = scratch.allocate(gemm.packed_length(dtype, depth, filters) * size_of(dtype))
    if panels != 0:
        words[word.ADDRESS] = source
        gemm.pack(dtype, threads, depth, filters, source, filters, 1, panels)
    return panels


@kernel
def release(state):
    """Frees what the node keeps. Nothing may run the node any more."""
    words = view(np.int64, state, word.WORDS)
    if words[word.TENSOR] != 0:
        tf.delete_tensor(words[word.TENSOR])
    if words[word.PANELS] != 0:
        scratch.free(words[word.PANELS])
