"""Separable convolution on the CPU: the depthwise and the pointwise step fused, forward and backward.

    mid[n,p,q,k]     = depthwise convolution of x, as in `depthwise`
    y[n,p,q,f]       = clamp(bias[f] + sum over k of mid[n,p,q,k] * pointwise[k,f] + residual[n,p,q,f])
    d_mid[n,p,q,k]   = sum over f of dy[n,p,q,f] * pointwise[k,f]
    d_pointwise[k,f] = sum over n, p, q of mid[n,p,q,k] * dy[n,p,q,f]
    d_x, d_depthwise = the gradients of the depthwise convolution for d_mid

Forward, mid never leaves L2: a thread fills a block of its rows and multiplies it at once. Backward, mid is computed
again rather than stored, as it is multiplied by dy, and d_mid for a few images at a time, so the scratch memory does
not grow with the batch; large images go through all steps in bands of lines (`separable_bands`).

Arrays are float32 or float64, forward also bfloat16: each step sums in float32, and mid is rounded between them.
"""

from __future__ import annotations

import numpy as np

from . import blocking, gemm
from . import depthwise as dw
from . import pointwise as pw
from . import separable_bands as bands
from .depthwise_gradients import gradients
from .images import images_at_once, of_images
from .jit import entry, kernel
from .memory import address, fence, keep, share, size_of, view
from .multiplier import repeat_channels, repeated_length, single, sum_repeated
from .packing import pack, packed_length
from .pool import parallel_kernel
from .scratch import give, require, take, take_in_share, try_take
from .simd import infinity

D_MID_BYTES = 2 << 20  # d_mid of some images at once: it is still in the caches when it is read
COLUMNS_AT_ONCE = 224  # of mid, from being computed to being packed: they are still in L1 or L2


@parallel_kernel
def _forward(
    dtype, worker, workers, g, filters, x, x_low, depthwise, pointwise, panels, start, residual_offset, y, low, high,
    lacking,
):  # fmt: skip
    """A worker's share of y: the depthwise step fills a block in L2, the pointwise step empties it.

    Parallel over: output pixels; where these are few, panels of filters too.
    """
    itemsize = size_of(dtype)
    pixels, depth = g.batch * g.out_height * g.out_width, g.channels
    row = blocking.padded_row(dtype, depth)
    first, last, f_first, f_last = blocking.work(dtype, pixels, filters, worker, workers)
    blocks = blocking.block_count(dtype, depth, last - first)
    most_rows = blocking.block_rows(dtype, last - first, blocks)
    block_length = most_rows * row
    streamed, thin = gemm.past_caches(dtype, pixels, filters, y), gemm.is_thin(dtype, pixels, 1)
    block = take_in_share(dtype, block_length + gemm.workspace_length(dtype, depth, most_rows), lacking)
    if block == 0:
        return
    own = block + block_length * itemsize
    for number in range(blocks):
        m0, m1 = blocking.block_range(dtype, first, last, blocks, number)
        dw.forward_pixels(
            dtype, g, 0, depth, m0, m1, x, x_low, depthwise, 0, block, row, 0, -infinity(dtype), infinity(dtype)
        )
        gemm.clear_behind(dtype, m1 - m0, depth, block, row)
        _, x_read = dw.input_range(g, m0, m1)
        x_next, x_last = dw.input_range(g, *blocking.block_range(dtype, first, last, blocks, number + 1))
        x_next = max(x_next, x_read)
        gemm.multiply_block(
            dtype, m1 - m0, depth, filters, f_first, f_last, block, row, 0, pointwise, filters, 1,
            thin, panels, own, start, residual_offset, y + m0 * filters * itemsize, streamed,
            x + x_next * itemsize, max(0, x_last - x_next), low, high,
        )  # fmt: skip
    fence()
    give(block)


@kernel
def _forward_single(dtype, g, filters, x, x_low, depthwise, pointwise, kept, bias, residual, y, low, high, threads):
    """Fills y; says whether there was memory. Assumes: g.multiplier is 1."""
    pixels, depth = g.batch * g.out_height * g.out_width, g.channels
    zeros, lacking = np.zeros(filters, dtype), np.zeros(1, np.intp)
    start = bias if bias != 0 else address(zeros)
    residual_offset = residual - y if residual != 0 else 0
    packed = try_take(dtype, gemm.shared_length(dtype, pixels, depth, filters, filters, 1, kept, threads))
    if packed == 0:
        return False
    panels = gemm.shared_panels(dtype, pixels, depth, filters, pointwise, filters, 1, kept, packed, threads)
    shares = blocking.shares(pixels, threads, panels != 0)
    _forward(
        dtype, shares, g, filters, x, x_low, depthwise, pointwise, panels, start, residual_offset, y, low, high,
        address(lacking),
    )  # fmt: skip
    keep(zeros)
    give(packed)
    return lacking[0] == 0


@kernel
def try_forward(dtype, g, filters, x, x_low, depthwise, pointwise, kept, bias, residual, y, low, high, threads):
    """Fills y `[N,P,Q,F]`; says whether there was memory. bias and residual may be 0 (absent).

    What of x is lower than x_low counts as x_low. `kept` is the pointwise kernel as `gemm.pack` packs it, or 0.
    """
    if g.multiplier == 1:
        return _forward_single(
            dtype, g, filters, x, x_low, depthwise, pointwise, kept, bias, residual, y, low, high, threads
        )
    repeated = try_take(dtype, repeated_length(g))
    if repeated == 0:
        return False
    repeat_channels(dtype, threads, g, x, repeated)
    had_memory = _forward_single(
        dtype, single(g), filters, repeated, x_low, depthwise, pointwise, kept, bias, residual, y, low, high, threads
    )
    give(repeated)
    return had_memory


@entry
def forward(dtype, g, filters, x, depthwise, pointwise, bias, y, x_low, low, high, threads):
    """Fills y `[N,P,Q,F]`. bias may be 0 (absent)."""
    require(try_forward(dtype, g, filters, x, x_low, depthwise, pointwise, 0, bias, 0, y, low, high, threads))


@parallel_kernel
def _pointwise_gradient(dtype, worker, workers, g, filters, x, depthwise, dy, d_pointwise, accumulate, lacking):
    """A worker's rectangle of d_pointwise. For each block of pixels the depthwise step fills strips of mid in L2: those
    of the rectangle's rows alone.

    Parallel over: rectangles of d_pointwise, so nothing is reduced.
    """
    itemsize, low, high = size_of(dtype), -infinity(dtype), infinity(dtype)
    pixels, depth, height = g.batch * g.out_height * g.out_width, g.channels, blocking.tile_rows(dtype)
    row = COLUMNS_AT_ONCE // height * height
    k_first, k_last, f_first, f_last = pw.gradient_work(dtype, depth, filters, worker, workers)
    length = pw.gradient_length(dtype, k_last - k_first)
    room = take_in_share(dtype, length + pw.MOST_BLOCK_ROWS * row, lacking)
    if room == 0:
        return
    mid, blocks = room + length * itemsize, pw.gradient_blocks(pixels)
    for block in range(blocks):
        m0, m1 = share(pixels, block, blocks)
        for k in range(k_first, k_last, row):
            k_end = min(k + row, k_last)
            dw.forward_pixels(dtype, g, k, k_end, m0, m1, x, low, depthwise, 0, mid - k * itemsize, row, 0, low, high)
            pw.pack_strips(dtype, m1 - m0, k - k_first, k_end - k, mid, row, room)
        _, x_read = dw.input_range(g, m0, m1)
        pw.add_strips(
            dtype, m1 - m0, k_last - k_first, f_last - f_first, dy + (m0 * filters + f_first) * itemsize, filters,
            d_pointwise + (k_first * filters + f_first) * itemsize, block == 0 and not accumulate,
            x + (x_read + k_first) * itemsize, depth, room,
        )  # fmt: skip
    give(room)


@kernel
def _add_pointwise_gradient(dtype, g, filters, x, depthwise, dy, d_pointwise, accumulate, threads):
    """d_pointwise, or += with `accumulate`; says whether there was memory."""
    if g.batch * g.out_height * g.out_width == 0 and not accumulate:
        view(dtype, d_pointwise, g.channels * filters)[:] = 0
    lacking = np.zeros(1, np.intp)
    _pointwise_gradient(dtype, threads, g, filters, x, depthwise, dy, d_pointwise, accumulate, address(lacking))
    return lacking[0] == 0


@kernel
def _backward_in_steps(dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, threads):
    """Fills what is wanted of d_x, d_depthwise, d_pointwise, some images at a time; says whether there was memory.

    Assumes: g.multiplier is 1.
    """
    low, high = -infinity(dtype), infinity(dtype)
    itemsize = size_of(dtype)
    pixels, depth = g.out_height * g.out_width, g.channels
    images = images_at_once(dtype, g, D_MID_BYTES)
    packs = (d_x != 0 or d_depthwise != 0) and images < g.batch  # the kernel, once for all parts
    room = packed_length(dtype, filters, depth) if packs else 0
    block, had_memory = try_take(dtype, room + images * pixels * depth), True
    if block == 0:
        return False
    kept, d_mid = 0, block + room * itemsize
    if packs:
        kept = block
        pack(dtype, threads, filters, depth, pointwise, 1, filters, kept)
    for n in range(0, max(1, g.batch), max(1, images)):  # an empty batch passes once: its gradients are zero
        part = of_images(g, min(images, g.batch - n))
        rows, accumulate = part.batch * pixels, n > 0
        x_part, dy_part = x + n * g.height * g.width * depth * itemsize, dy + n * pixels * filters * itemsize
        if d_pointwise != 0:
            had_memory &= _add_pointwise_gradient(
                dtype, part, filters, x_part, depthwise, dy_part, d_pointwise, accumulate, threads
            )
        if d_x != 0 or d_depthwise != 0:
            had_memory &= pw.multiply(
                dtype, rows, filters, depth, dy_part, pointwise, 1, filters, kept, 0, 0, d_mid, low, high, threads
            )
            d_x_part = d_x + n * g.height * g.width * depth * itemsize if d_x != 0 else 0
            had_memory &= gradients(dtype, part, x_part, depthwise, d_mid, d_x_part, d_depthwise, accumulate, threads)
    give(block)
    return had_memory


@kernel
def _backward_single(dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, threads):
    """Fills what is wanted of d_x, d_depthwise, d_pointwise; says whether there was memory.

    Assumes: g.multiplier is 1.
    """
    if bands.wanted(dtype, g, filters):
        return bands.backward(dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, threads)
    return _backward_in_steps(dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, threads)


@entry
def backward(dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, d_bias, threads):
    """Fills d_x, d_depthwise, d_pointwise and d_bias for dy `[N,P,Q,F]`, each where its address is not 0."""
    if g.multiplier == 1:
        had_memory = _backward_single(
            dtype, g, filters, x, depthwise, pointwise, dy, d_x, d_depthwise, d_pointwise, threads
        )
    else:
        length = repeated_length(g)
        repeated = take(dtype, 2 * length if d_x != 0 else length)
        d_repeated = repeated + length * size_of(dtype) if d_x != 0 else 0
        repeat_channels(dtype, threads, g, x, repeated)
        had_memory = _backward_single(
            dtype, single(g), filters, repeated, depthwise, pointwise, dy,
            d_repeated, d_depthwise, d_pointwise, threads,
        )  # fmt: skip
        if d_x != 0:
            sum_repeated(dtype, threads, g, d_repeated, d_x)
        give(repeated)
    if d_bias != 0:
        had_memory &= pw.column_sums(dtype, g.batch * g.out_height * g.out_width, filters, dy, d_bias, threads)
    require(had_memory)
