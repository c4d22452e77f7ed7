"""Which tile a problem gets on a card: tables, each row with its reason, and the choice among them.

Choices follow from the shape alone, counted on REFERENCE_MULTIPROCESSORS, so that every card sums in the same order;
but those of compute capability 9.0 have tiles of their own for half numbers and TF32.
The reasons are arithmetic; what has been raced on a card, the README tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..nvidia import LEAST_CAPABILITY
from .fragments import inlined

Architecture = tuple[int, int] | tuple[int, int, str]
HOPPER: Architecture = (9, 0, "a")  # the one that has the instructions of warpgroups; no later card runs them
REFERENCE_MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)
CHOICES_KEPT = 1024  # choices take as long as a launch, and shapes come again


class Launch(NamedTuple):
    """How a kernel is started for given sizes."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int  # dynamic; above 48 KB the launch has to ask the driver for it


class TiledKernel(NamedTuple):
    """A kernel for one dtype and tile, not compiled yet."""

    function: Callable[..., None]
    signature: Any  # Numba's
    launch_bounds: tuple[int, int]  # threads a block, blocks that shall fit a multiprocessor
    launch: Callable[..., Launch]  # of the sizes
    architecture: Architecture = LEAST_CAPABILITY  # whose instructions it is made of


class GemmTile(NamedTuple):
    """A block's tile of a matrix product."""

    name: str
    rows: int
    columns: int
    warp_rows: int  # warps along the rows
    warp_columns: int
    stages: int
    blocks: int  # on a multiprocessor at once
    copy_bytes: int
    speed: float  # of a multiprocessor full of such tiles, as a share of the best one's of all cards
    reason: str
    architecture: Architecture = LEAST_CAPABILITY  # HOPPER: products by warpgroups, four warps each

    @property
    def threads(self) -> int:
        return 32 * self.warp_rows * self.warp_columns

    @property
    def row_tiles(self) -> int:
        return self.rows // self.warp_rows // 16

    @property
    def column_tiles(self) -> int:
        return self.columns // self.warp_columns // 8

    @property
    def store_bytes(self) -> int:
        """Of the result, what a thread writes at once."""
        return 16 if self.copy_bytes == 16 else 4

    @property
    def sums(self) -> int:
        """Sums that a thread holds."""
        return 4 * self.row_tiles * self.column_tiles

    def blocks_of(self, rows: int, columns: int) -> int:
        """Blocks that a result of these sizes takes."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def cost(self, rows: int, columns: int) -> float:
        """Elements of a result that the fullest multiprocessor computes in whole rounds of tiles, over their speed."""
        rounds = -(-self.blocks_of(rows, columns) // REFERENCE_MULTIPROCESSORS)
        return rounds * self.rows * self.columns / self.speed


_WIDE = GemmTile(
    "wide", 128, 128, 2, 2, 4, 2, 16, 1.0,
    "warps of 64x64 read 4 KB of shared memory for 64 products of 16x8x16: what tensor cores outpace least; 128 sums "
    "and two sets of fragments fill 255 registers, so two blocks of 4 warps take turns at waiting",
)  # fmt: skip
_NARROW = GemmTile(
    "narrow", 128, 104, 4, 1, 4, 2, 16, 1.0,
    "728 = 7 x 104: with Xception's 11552 rows at batch 32, 637 tiles on 132 multiprocessors fill 97 % of 5 rounds, "
    "where 546 tiles of 128x128 fill 83 %",
)  # fmt: skip
_WIDE_FLOAT = _WIDE._replace(
    warp_columns=4,
    blocks=1,
    reason="three products a step want registers for both halves of each number: 8 warps of 64x32, one block",
)
_NARROW_FLOAT = _NARROW._replace(
    warp_rows=8,
    blocks=1,
    speed=0.85,
    reason=_NARROW.reason + "; 8 warps of 16x104 for the registers' sake, each of which splits all of B: 500 "
    "instructions for 78 products, where the wide tile has 440 for 96",
)
_SMALL = GemmTile(
    "small", 64, 64, 2, 2, 4, 4, 16, 0.7,
    "where few rows or columns would leave multiprocessors idle: four blocks of 4 warps of 32x32 on each",
)  # fmt: skip
_UNALIGNED = _SMALL._replace(
    name="unaligned",
    stages=3,
    blocks=3,
    copy_bytes=4,
    speed=0.3,
    reason="rows that are no multiple of 16 bytes: four times as many copies, of 4 bytes each",
)

POINTWISE: dict[str, tuple[GemmTile, ...]] = {
    "float32": (_WIDE_FLOAT, _NARROW_FLOAT, _SMALL._replace(blocks=3), _UNALIGNED),
    "tf32": (_WIDE, _NARROW, _SMALL),  # unaligned rows take float32's kernel, whose copies cost more than its products
    "bfloat16": (_WIDE, _NARROW, _SMALL, _UNALIGNED._replace(blocks=2)),
    "float16": (_WIDE, _NARROW, _SMALL, _UNALIGNED._replace(blocks=2)),
}

# Hopper's mma.sync is taken for 63 % as fast as its warpgroups, whose full speed is 1.6. Shared memory moves 128 bytes
# a cycle, in which tensor cores multiply 2048 half numbers. A stage of 64 takes rows * columns / 32 cycles of products;
# and of shared memory rows + columns to write it, and rows + 2 * columns for two warpgroups to read A once and B twice.
# Speeds are the former's share of the latter. Widths are multiples of 64, whole panels of B. A stage of TF32, 32 deep,
# is as many bytes, and tensor cores multiply half as many numbers a cycle: the same cycles, and so the same shares.
_WARPGROUPS_256 = GemmTile(
    "warpgroups256", 128, 256, 8, 1, 4, 1, 16, 1.6,
    "the widest product there is: 1024 cycles of products a stage, 1024 of shared memory; 128 sums a thread",
    HOPPER,
)  # fmt: skip
_WARPGROUPS_192 = GemmTile(
    "warpgroups192", 128, 192, 8, 1, 5, 1, 16, 1.48,
    "728 = 3.8 x 192, 1536 = 8 x 192: with Xception's 11552 rows at batch 32, 364 tiles fill 92 % of 3 rounds; "
    "768 cycles of products a stage, 832 of shared memory",
    HOPPER,
)  # fmt: skip
_WARPGROUPS_128 = GemmTile(
    "warpgroups128", 128, 128, 8, 1, 3, 2, 16, 1.28,
    "where wider tiles are too few: two blocks on each multiprocessor, one of which writes its results while the other "
    "multiplies; 512 cycles of products a stage, 640 of shared memory",
    HOPPER,
)  # fmt: skip
_WARPGROUPS = (_WARPGROUPS_256, _WARPGROUPS_192, _WARPGROUPS_128)
WARPGROUP_POINTWISE: dict[str, tuple[GemmTile, ...]] = {
    "tf32": _WARPGROUPS,
    "bfloat16": _WARPGROUPS,
    "float16": _WARPGROUPS,
}
ITEMSIZE = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}

# What transposing w for them costs, in products at speed 1, which is 60 % of 495 TFLOP/s / 132 on one multiprocessor:
# a number of w is read and written, 8 bytes at 3.3 TB/s, in the time of 2.7; its kernel starts, say 3 us, in that of
# 3.4 million; shared among the places of the depth, as what a tile costs is. So few rows leave w as it is. The gradient
# of w would have x and dy transposed, which takes longer than the product may save.
TRANSPOSED_NUMBER, TRANSPOSITION_START = 2.7, 3.4e6


def takes_only_deep(dtype: str, tile: GemmTile) -> bool:
    """Whether a tile takes only operands whose depth runs along their rows: warpgroups transpose half numbers alone."""
    return dtype == "tf32" and tile.architecture == HOPPER


def copy_bytes(dtype: str, *row_lengths: int) -> int:
    """The widest copy that serves rows of these lengths in elements; 0 where only the plain tier does (odd halves)."""
    return next((size for size in (16, 4) if not any(n * ITEMSIZE[dtype] % size for n in row_lengths)), 0)


def _fitting(dtype: str, row_lengths: tuple[int, ...], capability: tuple[int, int]) -> list[GemmTile]:
    """The tiles that take rows of these lengths on cards of this capability."""
    size = copy_bytes(dtype, *row_lengths)
    offered = POINTWISE[dtype] + (WARPGROUP_POINTWISE.get(dtype, ()) if capability == HOPPER[:2] else ())
    return [tile for tile in offered if tile.copy_bytes == size]


@lru_cache(CHOICES_KEPT)
def pointwise(
    dtype: str,
    rows: int,
    columns: int,
    row_lengths: tuple[int, ...],
    capability: tuple[int, int] = LEAST_CAPABILITY,
    wide_depth: int = 0,
) -> GemmTile | None:
    """The tile for a product of `rows` by `columns`, or None where it is the plain tier's.

    `row_lengths` are those of both operands and of the result in memory. `wide_depth` is the depth, if it runs across
    the rows of the second operand.
    """

    def cost(tile: GemmTile) -> float:
        product = tile.cost(rows, columns)
        if wide_depth and takes_only_deep(dtype, tile):
            return product + TRANSPOSED_NUMBER * columns + TRANSPOSITION_START / wide_depth
        return product

    return min(_fitting(dtype, row_lengths, capability), key=cost, default=None)


@lru_cache(CHOICES_KEPT)
def kernel_gradient(
    dtype: str, rows: int, columns: int, depth: int, capability: tuple[int, int] = LEAST_CAPABILITY
) -> GemmTile | None:
    """The tile for a product of `rows` by `columns` whose depth is split, or None where it is the plain tier's."""

    def cost(tile: GemmTile) -> float:
        share = kernel_gradient_share(tile, rows, columns, depth)
        rounds = -(-tile.blocks_of(rows, columns) * -(-depth // share) // REFERENCE_MULTIPROCESSORS)
        return rounds * tile.rows * tile.columns * share / tile.speed

    fitting = [tile for tile in _fitting(dtype, (rows, columns), capability) if not takes_only_deep(dtype, tile)]
    return min(fitting, key=cost, default=None)


def kernel_gradient_share(tile: GemmTile, rows: int, columns: int, depth: int) -> int:
    """Places of the depth that one split sums: two blocks for every multiprocessor, at least 256 places each."""
    splits = max(1, min(2 * REFERENCE_MULTIPROCESSORS // tile.blocks_of(rows, columns), depth // 256))
    return -(-depth // splits // 32) * 32


DEPTHWISE_THREADS = 128


class WindowTile(NamedTuple):
    """A depthwise kernel with its window in registers."""

    taps: int  # along the height and the width
    stride: int
    width: int  # channels a thread
    blocks: int
    reason: str
    relu: bool = False  # whether x passes a ReLU first: forward

    @property
    def name(self) -> str:
        return f"{self.taps}x{self.taps}_s{self.stride}_c{self.width}{'_relu' * self.relu}"

    @property
    def slots(self) -> int:
        """Outputs of a row that one column of input may belong to."""
        return -(-self.taps // self.stride)

    @property
    def gradient_columns(self) -> int:
        """Columns of input after which the backward pass is where it was: in its window, and in a stride."""
        return math.lcm(self.taps, self.stride)

    def segments(self, out_width: int) -> int:
        """Pieces that a row is cut into, each of 20 pixels at most: each reads two columns more than it has."""
        return -(-out_width // 20)

    def groups(self, out_width: int) -> int:
        """Rounds of the slots that a segment takes."""
        share = -(-out_width // self.segments(out_width))
        return -(-((share - 1) * self.stride + self.taps) // (self.slots * self.stride))

    def channel_bits(self, channels: int) -> int:
        """log2 of the threads of a block that stand side by side along the channels: a warp, or fewer if they do."""
        return min(5, (-(-channels // self.width) - 1).bit_length())

    def blocks_of(self, rows: int, channels: int, segments: int) -> int:
        """Blocks that the rows of all images take."""
        bits = self.channel_bits(channels)
        across = -(-channels // (self.width << bits))
        return across * segments * -(-rows // (DEPTHWISE_THREADS >> bits))

    def gradient_plan(self, bands: int, channels: int, width: int) -> GradientPlan:
        """How the backward pass shares the `bands` of all images: twice as many blocks as the card holds, no more."""
        segments, bits = self.segments(width), self.channel_bits(channels)
        side = DEPTHWISE_THREADS >> bits
        room = 2 * self.blocks * REFERENCE_MULTIPROCESSORS
        repeat = max(1, self.blocks_of(bands, channels, segments) // room)
        strip = -(-bands // (repeat * side)) * side
        # Whole strides, and room for the columns before the first one that a stride may begin with.
        share = -(-(width + self.stride - 1) // (segments * self.stride)) * self.stride
        groups = -(-(share + self.taps - 1) // self.gradient_columns)
        return GradientPlan(groups, segments, share, bits, strip, strip // side * segments)


class GradientPlan(NamedTuple):
    """The backward pass's sizes; `splits` partial sums come of it."""

    groups: int
    segments: int
    share: int  # columns of a segment
    channel_bits: int
    strip: int
    splits: int


@inlined
def bands_of(height, top, stride):
    """Bands of `stride` rows that an image's rows lie in, counted from the padding's first row on."""
    return (top % stride + height + stride - 1) // stride


@inlined
def window_place(block, thread, rows, channels, channel_bits, width):
    """(first channel, row, segment) of a thread: blocks follow each other along channels, then rows, then segments."""
    across = (channels + (width << channel_bits) - 1) // (width << channel_bits)
    down = (rows + (DEPTHWISE_THREADS >> channel_bits) - 1) // (DEPTHWISE_THREADS >> channel_bits)
    vector = (block % across << channel_bits) + (thread & ((1 << channel_bits) - 1))
    row = block // across % down * (DEPTHWISE_THREADS >> channel_bits) + (thread >> channel_bits)
    return np.int32(vector * width), np.int32(row), np.int32(block // across // down)


class SeparableTile(NamedTuple):
    """The fused separable kernel's: pixels a block holds and filters it takes at once, and its depthwise window."""

    gemm: GemmTile
    window: WindowTile

    @property
    def name(self) -> str:
        return f"{self.gemm.name}_{self.window.name}"

    def after_relu(self) -> SeparableTile:
        """The same for an x that passes a ReLU first."""
        return self._replace(window=self.window._replace(relu=True))


_WINDOW_FLOAT = WindowTile(
    3, 1, 4, 4,
    "4 channels, 16 bytes: 36 taps, 3 x 4 sums and the loads of a column fill 128 registers, so 16 warps are there to "
    "wait for memory, which sets the pace: 18 operations a pixel and channel against 8 bytes",
)  # fmt: skip
_WINDOW_HALF = WindowTile(
    3, 1, 8, 3,
    "8 channels, 16 bytes: 72 taps in float32 fill 168 registers; 12 warps, each asking for what 24 of 8 bytes would",
)  # fmt: skip
WINDOWS: dict[str, dict[int, WindowTile]] = {  # forward, by stride
    "float32": {1: _WINDOW_FLOAT, 2: _WINDOW_FLOAT._replace(stride=2, blocks=3)},
    "bfloat16": {1: _WINDOW_HALF, 2: _WINDOW_HALF._replace(stride=2, blocks=2)},
    "float16": {1: _WINDOW_HALF, 2: _WINDOW_HALF._replace(stride=2, blocks=2)},
}


def forward_windows(dtype: str) -> Iterator[WindowTile]:
    """The tiles of the forward pass, each without a ReLU of x and with one."""
    for window in WINDOWS[dtype].values():
        yield window
        yield window._replace(relu=True)


_GRADIENT_WINDOW = WindowTile(
    3, 1, 4, 3,
    "4 channels of any dtype: taps and sums of d_w, 36 each, with windows of x and d_x of 12 fill 168 registers",
)  # fmt: skip
GRADIENT_WINDOWS = {  # backward, of every dtype that has one forward, by stride
    1: _GRADIENT_WINDOW,
    2: _GRADIENT_WINDOW._replace(
        stride=2, blocks=2, reason=_GRADIENT_WINDOW.reason + "; two rows of windows want more"
    ),
}

_ROWS = "pixels whose mid fits beside the stages of w; 8 warps share a block, since only one fits"
SEPARABLE_GEMMS = tuple(
    GemmTile(f"rows{rows}", rows, 128, 2, 4, stages, 1, 16, 1.0, f"{rows} {_ROWS}")
    for rows, stages in ((128, 3), (96, 4), (64, 4))
)


def depthwise_forward(dtype: str, taps: tuple[int, int], strides: tuple[int, int], channels: int) -> WindowTile | None:
    """The forward tile for dilation 1 and multiplier 1, or None where it is the plain tier's."""
    return _serving(WINDOWS.get(dtype, {}), taps, strides, channels)


def depthwise_backward(dtype: str, taps: tuple[int, int], strides: tuple[int, int], channels: int) -> WindowTile | None:
    """The backward tile for dilation 1 and multiplier 1, or None where it is the plain tier's."""
    return _serving(GRADIENT_WINDOWS if dtype in WINDOWS else {}, taps, strides, channels)


def _serving(
    windows: dict[int, WindowTile], taps: tuple[int, int], strides: tuple[int, int], channels: int
) -> WindowTile | None:
    tile = windows.get(strides[0])
    if tile is None or taps != (tile.taps, tile.taps) or strides[0] != strides[1] or channels % tile.width:
        return None
    return tile
