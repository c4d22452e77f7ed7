"""Pointwise convolution, a matrix product over the channels, forward and backward: one element of the result a thread.

Letters: rows N*P*Q, K input channels, F filters. Arrays are C-contiguous; each may be of an element of its own.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, types

from . import sums
from .elements import ELEMENTS, clamped, scalar, sums_of
from .launch import Kernel, Stream, made_once
from .memory import ABSENT, Operand, scratch


def forward(
    rows: int,
    channels: int,
    filters: int,
    x: Operand,
    kernel: Operand,
    bias: Operand | None,
    y: Operand,
    clamp,
    stream: Stream,
) -> None:
    """Fills y `[rows,F]` from x `[rows,K]`, kernel `[K,F]`, bias `[F]` (of the kernel's element) or None."""
    run = forward_kernel(x.element, kernel.element, y.element)
    added = bias or ABSENT
    sizes = rows, channels, filters, math.isqrt(channels)
    run.over(
        rows * filters, stream, *sizes,
        x.pointer, kernel.pointer, added.pointer, int(bias is not None), y.pointer, *clamp,
    )  # fmt: skip


def backward(
    rows: int,
    channels: int,
    filters: int,
    x: Operand,
    kernel: Operand,
    dy: Operand,
    dx: Operand | None,
    d_kernel: Operand | None,
    d_bias: Operand | None,
    stream: Stream,
) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[rows,F]`."""
    if dx:
        run = d_x_kernel(kernel.element, dy.element, dx.element)
        sizes = rows, channels, filters, math.isqrt(filters)
        run.over(rows * channels, stream, *sizes, kernel.pointer, dy.pointer, dx.pointer)
    if d_kernel:
        weights = channels * filters
        split = sums.split(rows, weights)
        run = d_kernel_kernel(x.element, dy.element)
        with scratch(split.parts * weights, sums_of(x.element, dy.element), stream) as partial:
            run.over(
                split.parts * weights, stream, rows, channels, filters, split.length, split.run,
                x.pointer, dy.pointer, partial.pointer,
            )  # fmt: skip
            sums.over_parts(split.parts, weights, partial, d_kernel, stream)
    if d_bias:
        sums.over_rows(rows, filters, dy, d_bias, stream)


@made_once
def forward_kernel(x_element: str, kernel_element: str, y_element: str) -> Kernel:
    """The forward kernel for arrays of these elements."""
    load_x, load_kernel = ELEMENTS[x_element].load, ELEMENTS[kernel_element].load
    store, accumulator = ELEMENTS[y_element].store, getattr(np, sums_of(x_element, kernel_element, y_element))

    def pointwise_forward(rows, channels, filters, run, x, kernel, bias, biased, y, low, high):
        """y[row,f] = clamp(bias[f] + sum over k of x[row,k] * kernel[k,f])

        x `[rows,K]`, kernel `[K,F]`, bias `[F]` (read where `biased`), y `[rows,F]`.
        Sums of `run` channels each are added up, so that the error stays that of short sums.
        Parallel over: the elements of y. Assumes: nothing of the sizes.
        """
        i = cuda.grid(1)
        while i < rows * filters:
            f, row = i % filters, i // filters
            total = accumulator(0)
            for start in range(0, channels, run):
                short = accumulator(0)
                for k in range(start, min(start + run, channels)):
                    short += load_x(x, row * channels + k) * load_kernel(kernel, k * filters + f)
                total += short
            if biased:
                total += load_kernel(bias, f)
            store(y, i, clamped(total, low, high))
            i += cuda.gridsize(1)

    bound = scalar(sums_of(x_element, kernel_element, y_element))
    pointers = [ELEMENTS[name].pointer for name in (x_element, kernel_element, y_element)]
    return Kernel(
        pointwise_forward,
        (x_element, kernel_element, y_element),
        (*[types.int64] * 4, *pointers[:2], pointers[1], types.int32, pointers[2], bound, bound),
    )


@made_once
def d_x_kernel(kernel_element: str, dy_element: str, dx_element: str) -> Kernel:
    """The kernel of the input's gradient for arrays of these elements."""
    load_kernel, load_dy = ELEMENTS[kernel_element].load, ELEMENTS[dy_element].load
    store, accumulator = ELEMENTS[dx_element].store, getattr(np, sums_of(kernel_element, dy_element, dx_element))

    def pointwise_d_x(rows, channels, filters, run, kernel, dy, dx):
        """d_x[row,k] = sum over f of dy[row,f] * kernel[k,f]

        kernel `[K,F]`, dy `[rows,F]`, dx `[rows,K]`. Sums of `run` filters each are added up.
        Parallel over: the elements of dx. Assumes: nothing of the sizes.
        """
        i = cuda.grid(1)
        while i < rows * channels:
            k, row = i % channels, i // channels
            total = accumulator(0)
            for start in range(0, filters, run):
                short = accumulator(0)
                for f in range(start, min(start + run, filters)):
                    short += load_dy(dy, row * filters + f) * load_kernel(kernel, k * filters + f)
                total += short
            store(dx, i, total)
            i += cuda.gridsize(1)

    elements = (kernel_element, dy_element, dx_element)
    pointers = [ELEMENTS[name].pointer for name in elements]
    return Kernel(pointwise_d_x, elements, (*[types.int64] * 4, *pointers))


@made_once
def d_kernel_kernel(x_element: str, dy_element: str) -> Kernel:
    """The kernel of the kernel gradient's first stage for arrays of these elements."""
    load_x, load_dy = ELEMENTS[x_element].load, ELEMENTS[dy_element].load
    sums_element = sums_of(x_element, dy_element)
    accumulator = getattr(np, sums_element)

    def pointwise_d_kernel(rows, channels, filters, length, run, x, dy, partial):
        """partial[part,k,f] = sum over the part's rows of x[row,k] * dy[row,f]

        x `[rows,K]`, dy `[rows,F]`, partial `[parts,K,F]`; a part is `length` rows, summed in runs of `run`.
        Parallel over: the elements of partial. Assumes: parts * length reaches the number of rows.
        """
        weights = channels * filters
        count = (rows + length - 1) // length * weights if rows > 0 else weights
        i = cuda.grid(1)
        while i < count:
            weight, first = i % weights, i // weights * length
            f, k = weight % filters, weight // filters
            last = min(first + length, rows)
            total = accumulator(0)
            for start in range(first, last, run):
                short = accumulator(0)
                for row in range(start, min(start + run, last)):
                    short += load_x(x, row * channels + k) * load_dy(dy, row * filters + f)
                total += short
            partial[i] = total
            i += cuda.gridsize(1)

    pointers = [ELEMENTS[name].pointer for name in (x_element, dy_element, sums_element)]
    return Kernel(pointwise_d_kernel, (x_element, dy_element), (*[types.int64] * 5, *pointers))
