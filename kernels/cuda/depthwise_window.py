"""Depthwise convolution with the window in registers: a thread holds a few channels and slides along the width.

    forward    y[n,p,q,c]   = clamp(bias[c] + sum over r, s of x[n, p*v + r - top, q*v + s - left, c] * w[r,s,c])
    d_x        d_x[n,h,w,c] = sum over r, s of dy[n,p,q,c] * w[r,s,c],  p*v = h + top - r,  q*v = w + left - s
    d_kernel   d_w[r,s,c]   = sum over n, p, q of dy[n,p,q,c] * x[n, p*v + r - top, q*v + s - left, c]

x `[N,H,W,C]`, w `[R,S,C]`, y and dy `[N,P,Q,C]`; v is the stride. The taps stay in registers. Each column of the input
is loaded once a row of taps and added to the outputs it belongs to, whose sums wait in slots that are taken in turn;
the turns are unrolled, so that no register is ever moved. Threads of a warp hold neighbouring channels (whole lines of
memory), those of a block neighbouring rows of the image (whose inputs overlap: they meet in L1).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda, types

from . import channel_vectors, ptx
from .fragments import between, in_turn, inlined, select
from .tiles import DEPTHWISE_THREADS, Launch, TiledKernel, WindowTile, bands_of, window_place

THREADS = DEPTHWISE_THREADS


@cache
def tap_loader(dtype: str, width: int, taps: int):
    """load_taps((numbers, wanted, w, channel, channels)): all taps of the thread's channels, float32."""
    load, unpack = channel_vectors.loader(dtype, width), channel_vectors.unpacker(dtype, width)
    held = channel_vectors.register_count(dtype, width)

    def step(tap):
        @inlined
        def load_tap(state):
            numbers, wanted, w, channel, channels = state
            registers = cuda.local.array(held, types.uint32)
            load(registers, wanted, w, tap * channels + channel)
            unpack(numbers, tap * width, registers)

        return load_tap

    return in_turn([step(tap) for tap in range(taps)])


def window_rounds(dtype: str, tile: WindowTile, put):
    """run_round((group, (sums, weights), source, target)): one round of the slots.

    `put((sums, place, done, target))` takes each output that is complete, the `done`-th of its segment (which may lie
    before its begin or past its end), from sums[place:]. source is (x, offset, mine, above, before, height, width,
    channels): the offset of the first input of the segment, at row `above` and column `before` of its image.
    """
    taps, stride, vector, slots = tile.taps, tile.stride, tile.width, tile.slots
    columns = slots * stride  # of input in one round of the slots
    held = channel_vectors.register_count(dtype, vector)
    load, unpack = channel_vectors.loader(dtype, vector), channel_vectors.unpacker(dtype, vector)

    def add_row(phase, row):
        """Loads the input under one row of taps in column `phase` of a round, and adds it to its outputs."""

        @inlined
        def add(state):
            group, (sums, weights), (x, offset, mine, above, before, height, width, channels), _ = state
            registers = cuda.local.array(held, types.uint32)
            inputs = cuda.local.array(vector, types.float32)
            at = np.int32(group * columns + phase)
            inside = (before + at >= 0) & (before + at < width) & (above + row >= 0) & (above + row < height)
            load(registers, mine & inside, x, offset + (np.int64(row) * width + at) * channels)
            unpack(inputs, 0, registers)
            if tile.relu:
                for i in range(vector):
                    inputs[i] = select(inputs[i] < np.float32(0), np.float32(0), inputs[i])
            for back in range(slots):
                column = phase % stride + back * stride
                if column < taps:
                    slot = (phase // stride - back + slots) % slots
                    for i in range(vector):
                        sums[slot * vector + i] += inputs[i] * weights[(row * taps + column) * vector + i]

        return add

    def finish(phase):
        """Hands on the output whose last column of taps lies on column `phase` of a round, and empties its slot."""
        back = (phase - (taps - 1)) // stride
        place = back % slots * vector

        @inlined
        def hand_on(state):
            group, (sums, _), _, target = state
            put((sums, place, np.int32(group * slots + back), target))
            for i in range(vector):
                sums[place + i] = np.float32(0)

        return hand_on

    steps = []
    for phase in range(columns):
        steps += [add_row(phase, row) for row in range(taps)]
        steps += [finish(phase)] * ((phase - (taps - 1)) % stride == 0)
    return in_turn(steps)


@cache
def forward(dtype: str, tile: WindowTile) -> TiledKernel:
    """The forward pass, of max(x, 0) instead of x if `tile.relu`.

    kernel(x, w, bias, y, rows, height, width, channels, out_height, out_width, top, left, groups, segments,
           channel_bits, has_bias, low, high), where rows = N*P; groups, segments and channel_bits are the tile's.
    Parallel over: channels, rows of y, and segments of a row. Assumes: C is a multiple of `tile.width`, dilation 1.
    """
    taps, stride, vector = tile.taps, tile.stride, tile.width
    held = channel_vectors.register_count(dtype, vector)
    sums_count, taps_count = tile.slots * vector, taps * taps * vector
    load, unpack = channel_vectors.loader(dtype, vector), channel_vectors.unpacker(dtype, vector)
    pack, store = channel_vectors.packer(dtype, vector), channel_vectors.storer(dtype, vector)
    load_taps = tap_loader(dtype, vector, taps * taps)

    @inlined
    def put(state):
        sums, place, done, (added, low, high, wanted, y, offset, count, channels) = state
        registers = cuda.local.array(held, types.uint32)
        for i in range(vector):
            sums[place + i] = between(sums[place + i] + added[i], low, high)
        pack(registers, sums, place)
        store(registers, wanted & (done >= 0) & (done < count), y, offset + np.int64(done) * channels)

    run_round = window_rounds(dtype, tile, put)

    @inlined
    def load_bias(added, wanted, bias, channel):
        registers = cuda.local.array(held, types.uint32)
        load(registers, wanted, bias, channel)
        unpack(added, 0, registers)

    def depthwise_forward(
        x, w, bias, y, rows, height, width, channels, out_height, out_width, top, left, groups, segments,
        channel_bits, has_bias, low, high,
    ):  # fmt: skip
        sums = cuda.local.array(sums_count, types.float32)
        weights = cuda.local.array(taps_count, types.float32)
        added = cuda.local.array(vector, types.float32)
        channel, row, segment = window_place(cuda.blockIdx.x, cuda.threadIdx.x, rows, channels, channel_bits, vector)
        mine = (channel < channels) & (row < rows) & (segment < segments)
        load_taps((weights, mine, w, channel, channels))
        load_bias(added, mine & (has_bias != 0), bias, channel)
        for i in range(sums_count):
            sums[i] = np.float32(0)
        share = np.int32((out_width + segments - 1) // segments)
        first = np.int32(segment * share)
        count = np.int32(select(first + share < out_width, share, out_width - first))
        above, before = np.int32(row % out_height * stride - top), np.int32(first * stride - left)
        offset = ((np.int64(row // out_height) * height + above) * width + before) * channels + channel
        out_offset = (np.int64(row) * out_width + first) * channels + channel
        source = (x, offset, mine, above, before, height, width, channels)
        target = (added, low, high, mine, y, out_offset, count, channels)
        for group in range(groups):
            run_round((group, (sums, weights), source, target))

    def launch(rows: int, channels: int, out_width: int) -> Launch:
        return Launch((tile.blocks_of(rows, channels, tile.segments(out_width)), 1, 1), THREADS, 0)

    pointer = channel_vectors.pointer(dtype)
    signature = types.void(*[pointer] * 4, *[types.int32] * 12, *[types.float32] * 2)
    return TiledKernel(depthwise_forward, signature, (THREADS, tile.blocks), launch)


def _gradient_rounds(dtype: str, tile: WindowTile):
    """run_round((group, numbers, place, source, d_x)): as many columns of x as bring slots and strides back in turn.

    numbers is (weights, sums, window, waiting): the taps, the sums of d_w, and for each row of the band the `taps`
    columns of x and of d_x in the window. place is (h, first, count, p, q): of x the band's first row, the segment's
    first column and how many it has; of dy the last row and the first column that touch them. source is (x, dy, offset,
    gradient, mine, height, width, out_height, out_width, channels), the offsets those of (h, first) and of (p, q).
    """
    taps, stride, vector, columns = tile.taps, tile.stride, tile.width, tile.gradient_columns
    held = channel_vectors.register_count(dtype, vector)
    load, unpack = channel_vectors.loader(dtype, vector), channel_vectors.unpacker(dtype, vector)
    pack, store = channel_vectors.packer(dtype, vector), channel_vectors.storer(dtype, vector)
    whole = stride == 1  # bands and segments lie in the image, and registers are too few to ask

    @inlined
    def is_inside(column, row, place, height):
        h, first, count, _, _ = place
        return (column < count) & (whole | ((first + column >= 0) & (h + row >= 0) & (h + row < height)))

    def load_input(phase, row):
        """Loads, of one row of the band, the column of x that enters the window in column `phase` of a round."""
        slot = (row * taps + (phase + taps - 1) % taps) * vector

        @inlined
        def load_column(state):
            group, (_, _, window, _), place, source, _ = state
            x, _, offset, _, mine, height, width, _, _, channels = source
            registers = cuda.local.array(held, types.uint32)
            at = np.int32(group * columns + phase)
            inside = mine & is_inside(at, row, place, height)
            load(registers, inside, x, offset + (np.int64(row) * width + at) * channels)
            unpack(window, slot, registers)

        return load_column

    def add_row(phase, back):
        """Loads dy `back` rows before p, and adds to d_x in the window and to d_w of the taps that meet it there."""

        @inlined
        def add(state):
            group, (weights, sums, window, waiting), (_, _, _, p, q), source, _ = state
            _, dy, _, gradient, mine, _, _, out_height, out_width, channels = source
            registers = cuda.local.array(held, types.uint32)
            values = cuda.local.array(vector, types.float32)
            at = np.int32(group * (columns // stride) + phase // stride)
            inside = (q + at >= 0) & (q + at < out_width) & (p - back >= 0) & (p - back < out_height)
            load(registers, mine & inside, dy, gradient + (at - np.int64(back) * out_width) * channels)
            unpack(values, 0, registers)
            for row in range(back * stride, min(taps, (back + 1) * stride)):
                for column in range(taps):
                    slot = (row % stride * taps + (phase + column) % taps) * vector
                    tap = (row * taps + column) * vector
                    for i in range(vector):
                        waiting[slot + i] += values[i] * weights[tap + i]
                        sums[tap + i] += values[i] * window[slot + i]

        return add

    def finish(phase, row):
        """Writes, of one row of the band, the column of d_x that leaves the window, and empties its slot."""
        slot = (row * taps + phase % taps) * vector

        @inlined
        def write(state):
            group, (_, _, _, waiting), place, source, d_x = state
            _, _, offset, _, mine, height, width, _, _, channels = source
            registers = cuda.local.array(held, types.uint32)
            pack(registers, waiting, slot)
            for i in range(vector):
                waiting[slot + i] = np.float32(0)
            done = np.int32(group * columns + phase - (taps - 1))
            inside = mine & (done >= 0) & is_inside(done, row, place, height)
            store(registers, inside, d_x, offset + (np.int64(row) * width + done) * channels)

        return write

    steps = []
    for phase in range(columns):
        steps += [load_input(phase, row) for row in range(stride)]
        steps += [add_row(phase, back) for back in range(tile.slots)] * (phase % stride == 0)
        steps += [finish(phase, row) for row in range(stride)]
    return in_turn(steps)


@cache
def backward(dtype: str, tile: WindowTile) -> TiledKernel:
    """Both gradients in one pass: dy is loaded once for `stride` rows of taps, x once.

    kernel(x, w, dy, d_x, partials, bands, height, width, channels, out_height, out_width, top, left, groups, share,
           channel_bits, strip): `bands` are those of all images, the last four are `tile.gradient_plan`'s.
    A band is `stride` rows of x whose first one lies under row 0 of the taps for some row p of dy. So its row b meets
    row b of the taps with row p, row b + stride with row p - 1, and so on. A segment begins with a column that lies
    under the last column of the taps for some column of dy.
    partials `[splits,R,S,C]` float32, to be added by `partial_sums.add_partials`. A thread takes every `strip`-th band
    and keeps its sums of d_w throughout; the bands of a block then meet in shared memory.
    Parallel over: channels, bands of x, and segments of a row. Assumes: as `forward`.
    """
    taps, stride, vector = tile.taps, tile.stride, tile.width
    window_count, taps_count = stride * taps * vector, taps * taps * vector
    load_taps, sum_bands = tap_loader(dtype, vector, taps * taps), _block_sum(taps * taps)
    run_round = _gradient_rounds(dtype, tile)

    def depthwise_backward(
        x, w, dy, d_x, partials, bands, height, width, channels, out_height, out_width, top, left, groups, share,
        channel_bits, strip,
    ):  # fmt: skip
        weights = cuda.local.array(taps_count, types.float32)
        sums = cuda.local.array(taps_count, types.float32)
        window = cuda.local.array(window_count, types.float32)
        waiting = cuda.local.array(window_count, types.float32)
        channel, first_band, segment = window_place(
            cuda.blockIdx.x, cuda.threadIdx.x, strip, channels, channel_bits, vector
        )
        load_taps((weights, channel < channels, w, channel, channels))
        for i in range(taps_count):
            sums[i] = np.float32(0)
        first = np.int32(segment * share - (left + (stride - 1) * (taps - 1)) % stride)
        count = np.int32(select(first + share < width, share, width - first))
        q = np.int32((first + left - (taps - 1)) // stride)
        image_bands = bands_of(height, top, stride)
        for turn in range((bands + strip - 1) // strip):
            band = np.int32(first_band + turn * strip)
            mine = (channel < channels) & (band < bands)
            p = np.int32(band % image_bands + top // stride)
            h = np.int32(p * stride - top)
            offset = ((np.int64(band // image_bands) * height + h) * width + first) * channels + channel
            gradient = ((np.int64(band // image_bands) * out_height + p) * out_width + q) * channels + channel
            for i in range(window_count):
                window[i] = np.float32(0)
                waiting[i] = np.float32(0)
            numbers, place = (weights, sums, window, waiting), (h, first, count, p, q)
            source = (x, dy, offset, gradient, mine, height, width, out_height, out_width, channels)
            for group in range(groups):
                run_round((group, numbers, place, source, d_x))
        side = cuda.threadIdx.x & ((1 << channel_bits) - 1)
        sum_bands(sums, partials, channel - side * vector, channels, channel_bits)

    def launch(bands: int, channels: int, width: int) -> Launch:
        plan = tile.gradient_plan(bands, channels, width)
        return Launch((tile.blocks_of(plan.strip, channels, plan.segments), 1, 1), THREADS, taps * taps * THREADS * 16)

    pointer = channel_vectors.pointer(dtype)
    signature = types.void(*[pointer] * 4, types.CPointer(types.float32), *[types.int32] * 12)
    return TiledKernel(depthwise_backward, signature, (THREADS, tile.blocks), launch)


@cache
def _block_sum(taps: int):
    """sum_rows(sums, partials, channel, channels, channel_bits): adds the sums of a block's rows, in their order.

    sums holds `[taps, 4]` of each thread, whose block begins at `channel`; they go to partials[block's part, taps, C].
    """

    @inlined
    def sum_rows(sums, partials, channel, channels, channel_bits):
        registers = cuda.local.array(4, types.uint32)
        total = cuda.local.array(4, types.float32)
        shared, thread, side = ptx.shared_memory(), cuda.threadIdx.x, 1 << channel_bits
        for tap in range(taps):
            for i in range(4):
                registers[i] = ptx.bits_of(sums[4 * tap + i])
            ptx.store_shared_128(True, shared + (tap * THREADS + thread) * 16, registers, 0)
        cuda.syncthreads()
        part = np.int64(cuda.blockIdx.x // ((channels + 4 * side - 1) // (4 * side)))
        for turn in range((taps * side + THREADS - 1) // THREADS):
            item = turn * THREADS + thread
            mine = item < taps * side
            tap, at = select(mine, item >> channel_bits, 0), item & (side - 1)
            for i in range(4):
                total[i] = np.float32(0)
            for row in range(THREADS >> channel_bits):
                ptx.load_shared_128(registers, 0, shared + (tap * THREADS + row * side + at) * 16)
                for i in range(4):
                    total[i] += ptx.float_of(registers[i])
            for i in range(4):
                registers[i] = ptx.bits_of(total[i])
            place = (part * taps + tap) * channels + channel + 4 * at
            ptx.store_global_128(mine & (channel + 4 * at < channels), partials, place, registers, 0)

    return sum_rows
