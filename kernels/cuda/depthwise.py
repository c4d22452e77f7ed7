"""Depthwise convolution, forward and backward: plain kernels, one element of the result a thread.

Letters as in `geometry`. Arrays are C-contiguous and channels-last; each may be of an element of its own.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from ..geometry import Geometry
from . import sums
from .elements import ELEMENTS, clamped, scalar, sums_of
from .launch import GEOMETRY, Kernel, Stream, made_once
from .memory import ABSENT, Operand, scratch


def forward(
    g: Geometry,
    x: Operand,
    kernel: Operand,
    bias: Operand | None,
    y: Operand,
    clamp,
    relu_x: bool,
    stream: Stream,
) -> None:
    """Fills y `[N,P,Q,C*M]` from x `[N,H,W,C]`, kernel `[R,S,C,M]`, bias `[C*M]` (of the kernel's element) or None."""
    run = forward_kernel(x.element, kernel.element, y.element)
    added = bias or ABSENT
    count = g.batch * g.out_height * g.out_width * g.channels * g.multiplier
    run.over(
        count, stream, g, x.pointer, int(relu_x), kernel.pointer, added.pointer, int(bias is not None), y.pointer,
        *clamp,
    )  # fmt: skip


def backward(
    g: Geometry,
    x: Operand,
    kernel: Operand,
    dy: Operand,
    dx: Operand | None,
    d_kernel: Operand | None,
    d_bias: Operand | None,
    stream: Stream,
) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[N,P,Q,C*M]`."""
    if dx:
        run = d_x_kernel(kernel.element, dy.element, dx.element)
        count = g.batch * g.height * g.width * g.channels
        run.over(count, stream, g, kernel.pointer, dy.pointer, dx.pointer)
    pixels = g.batch * g.out_height * g.out_width
    if d_kernel:
        weights = g.kernel_height * g.kernel_width * g.channels * g.multiplier
        split = sums.split(pixels, weights)
        run = d_kernel_kernel(x.element, dy.element)
        with scratch(split.parts * weights, sums_of(x.element, dy.element), stream) as partial:
            run.over(split.parts * weights, stream, g, x.pointer, dy.pointer, partial.pointer, split.length, split.run)
            sums.over_parts(split.parts, weights, partial, d_kernel, stream)
    if d_bias:
        sums.over_rows(pixels, g.channels * g.multiplier, dy, d_bias, stream)


@made_once
def forward_kernel(x_element: str, kernel_element: str, y_element: str) -> Kernel:
    """The forward kernel for arrays of these elements."""
    load_x, load_kernel = ELEMENTS[x_element].load, ELEMENTS[kernel_element].load
    store, accumulator = ELEMENTS[y_element].store, getattr(np, sums_of(x_element, kernel_element, y_element))
    zero = getattr(np, sums_of(x_element))(0)

    def depthwise_forward(g, x, relu_x, kernel, bias, biased, y, low, high):
        """y[n,p,q,c*M+m] = clamp(bias[c*M+m]
            + sum over r, s of x[n, p*sh+r*dh-top, q*sw+s*dw-left, c] * kernel[r,s,c,m])

        x `[N,H,W,C]` (max(x, 0) where `relu_x`), kernel `[R,S,C,M]`, bias `[C*M]` (read where `biased`),
        y `[N,P,Q,C*M]`.
        Parallel over: the elements of y. Assumes: nothing of the sizes.
        """
        channels = g.channels * g.multiplier
        count = g.batch * g.out_height * g.out_width * channels
        i = cuda.grid(1)
        while i < count:
            k, pixel = i % channels, i // channels
            c, m = k // g.multiplier, k % g.multiplier
            q, image_row = pixel % g.out_width, pixel // g.out_width
            p, n = image_row % g.out_height, image_row // g.out_height
            total = accumulator(0)
            for r in range(g.kernel_height):
                h = p * g.stride_height + r * g.dilation_height - g.pad_top
                if 0 <= h < g.height:
                    for s in range(g.kernel_width):
                        w = q * g.stride_width + s * g.dilation_width - g.pad_left
                        if 0 <= w < g.width:
                            source = ((n * g.height + h) * g.width + w) * g.channels + c
                            tap = ((r * g.kernel_width + s) * g.channels + c) * g.multiplier + m
                            value = load_x(x, source)
                            if relu_x and value < 0:
                                value = zero
                            total += value * load_kernel(kernel, tap)
            if biased:
                total += load_kernel(bias, k)
            store(y, i, clamped(total, low, high))
            i += cuda.gridsize(1)

    bound = scalar(sums_of(x_element, kernel_element, y_element))
    pointers = [ELEMENTS[name].pointer for name in (x_element, kernel_element, y_element)]
    return Kernel(
        depthwise_forward,
        (x_element, kernel_element, y_element),
        (GEOMETRY, pointers[0], types.int32, *[pointers[1]] * 2, types.int32, pointers[2], bound, bound),
    )


@made_once
def d_x_kernel(kernel_element: str, dy_element: str, dx_element: str) -> Kernel:
    """The kernel of the input's gradient for arrays of these elements."""
    load_kernel, load_dy = ELEMENTS[kernel_element].load, ELEMENTS[dy_element].load
    store, accumulator = ELEMENTS[dx_element].store, getattr(np, sums_of(kernel_element, dy_element, dx_element))

    def depthwise_d_x(g, kernel, dy, dx):
        """d_x[n,h,w,c] = sum over r, s, m of dy[n,p,q,c*M+m] * kernel[r,s,c,m],

        (p, q) the output pixel that reads (h, w) at tap (r, s): p*sh = h + top - r*dh, q*sw = w + left - s*dw.
        kernel `[R,S,C,M]`, dy `[N,P,Q,C*M]`, dx `[N,H,W,C]`.
        Parallel over: the elements of dx. Assumes: nothing of the sizes.
        """
        count = g.batch * g.height * g.width * g.channels
        i = cuda.grid(1)
        while i < count:
            c, pixel = i % g.channels, i // g.channels
            w, image_row = pixel % g.width, pixel // g.width
            h, n = image_row % g.height, image_row // g.height
            total = accumulator(0)
            for r in range(g.kernel_height):
                below = h + g.pad_top - r * g.dilation_height
                p = below // g.stride_height
                if below >= 0 and below % g.stride_height == 0 and p < g.out_height:
                    for s in range(g.kernel_width):
                        beside = w + g.pad_left - s * g.dilation_width
                        q = beside // g.stride_width
                        if beside >= 0 and beside % g.stride_width == 0 and q < g.out_width:
                            source = (((n * g.out_height + p) * g.out_width + q) * g.channels + c) * g.multiplier
                            tap = ((r * g.kernel_width + s) * g.channels + c) * g.multiplier
                            for m in range(g.multiplier):
                                total += load_dy(dy, source + m) * load_kernel(kernel, tap + m)
            store(dx, i, total)
            i += cuda.gridsize(1)

    elements = (kernel_element, dy_element, dx_element)
    return Kernel(depthwise_d_x, elements, (GEOMETRY, *(ELEMENTS[name].pointer for name in elements)))


@made_once
def d_kernel_kernel(x_element: str, dy_element: str) -> Kernel:
    """The kernel of the kernel gradient's first stage for arrays of these elements."""
    load_x, load_dy = ELEMENTS[x_element].load, ELEMENTS[dy_element].load
    sums_element = sums_of(x_element, dy_element)
    accumulator = getattr(np, sums_element)

    def depthwise_d_kernel(g, x, dy, partial, length, run):
        """partial[part,r,s,c,m] = sum over the part's pixels (n, p, q)
            of dy[n,p,q,c*M+m] * x[n, p*sh+r*dh-top, q*sw+s*dw-left, c]

        x `[N,H,W,C]`, dy `[N,P,Q,C*M]`, partial `[parts,R,S,C,M]`; a part is `length` pixels in the order of dy.
        Within it, sums of `run` pixels each are added up, so that the error stays that of short sums.
        Parallel over: the elements of partial. Assumes: parts * length reaches the number of pixels.
        """
        weights = g.kernel_height * g.kernel_width * g.channels * g.multiplier
        pixels = g.batch * g.out_height * g.out_width
        count = (pixels + length - 1) // length * weights if pixels > 0 else weights
        i = cuda.grid(1)
        while i < count:
            weight, first = i % weights, i // weights * length
            m, weight_pixel = weight % g.multiplier, weight // g.multiplier
            c, tap = weight_pixel % g.channels, weight_pixel // g.channels
            below = tap // g.kernel_width * g.dilation_height - g.pad_top
            beside = tap % g.kernel_width * g.dilation_width - g.pad_left
            last = min(first + length, pixels)
            total = accumulator(0)
            for start in range(first, last, run):
                short = accumulator(0)
                for pixel in range(start, min(start + run, last)):
                    q, image_row = pixel % g.out_width, pixel // g.out_width
                    p, n = image_row % g.out_height, image_row // g.out_height
                    h, w = p * g.stride_height + below, q * g.stride_width + beside
                    if 0 <= h < g.height and 0 <= w < g.width:
                        source = ((n * g.height + h) * g.width + w) * g.channels + c
                        target = (pixel * g.channels + c) * g.multiplier + m
                        short += load_x(x, source) * load_dy(dy, target)
                total += short
            partial[i] = total
            i += cuda.gridsize(1)

    pointers = [ELEMENTS[name].pointer for name in (x_element, dy_element, sums_element)]
    return Kernel(depthwise_d_kernel, (x_element, dy_element), (GEOMETRY, *pointers, types.int64, types.int64))
