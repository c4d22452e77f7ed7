"""A depth multiplier M, served by repeating each input channel M times: the kernels then know only M = 1."""

from __future__ import annotations

from ..geometry import Geometry
from .jit import kernel
from .memory import share, view
from .pool import parallel_kernel


@kernel
def single(g):
    """The geometry of the same convolution over input channels repeated `multiplier` times: its multiplier is 1."""
    return Geometry(
        g.batch, g.height, g.width, g.channels * g.multiplier, 1, g.kernel_height, g.kernel_width,
        g.stride_height, g.stride_width, g.dilation_height, g.dilation_width, g.pad_top, g.pad_left,
        g.out_height, g.out_width,
    )  # fmt: skip


@kernel
def repeated_length(g):
    """Elements of x with each channel repeated `multiplier` times."""
    return g.batch * g.height * g.width * g.channels * g.multiplier


@parallel_kernel
def repeat_channels(dtype, worker, workers, g, x, repeated):
    """A worker's share of repeated[i*M + m] = x[i], i counting the elements of x.

    Parallel over: elements of x.
    """
    count = g.batch * g.height * g.width * g.channels
    source, target = view(dtype, x, count), view(dtype, repeated, count * g.multiplier)
    first, last = share(count, worker, workers)
    for i in range(first, last):
        for m in range(g.multiplier):
            target[i * g.multiplier + m] = source[i]


@parallel_kernel
def sum_repeated(dtype, worker, workers, g, repeated, d_x):
    """A worker's share of d_x[i] = sum over m of repeated[i*M + m]: the gradient of `repeat_channels`.

    Parallel over: elements of d_x.
    """
    count = g.batch * g.height * g.width * g.channels
    source, target = view(dtype, repeated, count * g.multiplier), view(dtype, d_x, count)
    first, last = share(count, worker, workers)
    for i in range(first, last):
        total = source[i * g.multiplier]
        for m in range(1, g.multiplier):
            total += source[i * g.multiplier + m]
        target[i] = total
