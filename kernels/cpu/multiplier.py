"""A depth multiplier M, served by repeating each input channel M times: the kernels then know only M = 1."""

from __future__ import annotations

import numpy as np

from ..geometry import Geometry
from .jit import kernel
from .memory import view


@kernel
def single(g):
    """The geometry of the same convolution over input channels repeated `multiplier` times: its multiplier is 1."""
    return Geometry(
        g.batch, g.height, g.width, g.channels * g.multiplier, 1, g.kernel_height, g.kernel_width,
        g.stride_height, g.stride_width, g.dilation_height, g.dilation_width, g.pad_top, g.pad_left,
        g.out_height, g.out_width,
    )  # fmt: skip


@kernel
def repeat_channels(dtype, g, x):
    """x with each channel repeated `multiplier` times, as a new array `[N*H*W*C*M]`."""
    count = g.batch * g.height * g.width * g.channels
    source = view(dtype, x, count)
    repeated = np.empty(count * g.multiplier, dtype)
    for i in range(count):
        for m in range(g.multiplier):
            repeated[i * g.multiplier + m] = source[i]
    return repeated


@kernel
def sum_repeated(dtype, g, repeated, d_x):
    """d_x[i] = sum over m of repeated[i*M + m]: the gradient of `repeat_channels`."""
    target = view(dtype, d_x, g.batch * g.height * g.width * g.channels)
    for i in range(target.size):
        total = repeated[i * g.multiplier]
        for m in range(1, g.multiplier):
            total += repeated[i * g.multiplier + m]
        target[i] = total
