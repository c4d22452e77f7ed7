"""Shapes of a depthwise convolution, worked out once and taken by every kernel.

Letters, fixed across the project: N batch, H W input, P Q output, C channels, M depth multiplier, F filters,
R S taps. Everything here is integer arithmetic; nothing touches an array.
"""

from __future__ import annotations

from typing import NamedTuple

Pair = tuple[int, int]
Padding = str | tuple[Pair, Pair]


class Geometry(NamedTuple):
    """A depthwise convolution over `[N,H,W,C]` with a kernel `[R,S,C,M]`, giving `[N,P,Q,C*M]`.

    Output pixel (p, q) and tap (r, s) read input pixel
    `h = p*stride_height + r*dilation_height - pad_top`, `w = q*stride_width + s*dilation_width - pad_left`;
    a tap that falls outside the image contributes nothing.
    """

    batch: int
    height: int
    width: int
    channels: int
    multiplier: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    dilation_height: int
    dilation_width: int
    pad_top: int
    pad_left: int
    out_height: int
    out_width: int

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.height, self.width, self.channels

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        return self.kernel_height, self.kernel_width, self.channels, self.multiplier

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_height, self.out_width, self.channels * self.multiplier


def effective_size(taps: int, dilation: int) -> int:
    """The span, in input pixels, of `taps` taps that stand `dilation` apart."""
    return (taps - 1) * dilation + 1


# The next three are plain integer arithmetic, for the callers that are compiled too.
def same_length(size: int, stride: int) -> int:
    """Length of the output along one axis under "same" padding."""
    return -(-size // stride)


def same_padding(size: int, out: int, span: int, stride: int) -> int:
    """Zeros before the image under "same" padding, where an odd one stands behind, as in TensorFlow."""
    return max(0, (out - 1) * stride + span - size) // 2


def explicit_length(size: int, span: int, stride: int, before: int, after: int) -> int:
    """Length of the output along an axis with `before` and `after` zeros around it; 0 where the kernel does not fit."""
    return max(0, (size + before + after - span) // stride + 1)


def output_length(size: int, taps: int, stride: int, dilation: int, padding: str | Pair) -> int:
    """Length of the output along one axis; 0 where the kernel does not fit."""
    if padding == "same":
        return same_length(size, stride)
    before, after = (0, 0) if isinstance(padding, str) else padding
    return explicit_length(size, effective_size(taps, dilation), stride, before, after)


def padding_before(size: int, taps: int, stride: int, dilation: int, padding: str | Pair) -> int:
    """Zeros that stand before the image along one axis."""
    if padding == "same":
        return same_padding(size, same_length(size, stride), effective_size(taps, dilation), stride)
    return 0 if isinstance(padding, str) else padding[0]


def resolve(
    input_shape: tuple[int, int, int, int],
    kernel_shape: tuple[int, int, int, int],
    strides: Pair,
    padding: Padding,
    dilation_rate: Pair,
) -> Geometry:
    """The Geometry of a depthwise convolution of `[N,H,W,C]` by `[R,S,C,M]`.

    `padding` is "valid", "same" or `((top, bottom), (left, right))`. The arguments are taken as checked.
    """
    batch, height, width, channels = input_shape
    taps_h, taps_w, _, multiplier = kernel_shape
    pad_h, pad_w = (padding, padding) if isinstance(padding, str) else padding
    rows = (height, taps_h, strides[0], dilation_rate[0], pad_h)
    columns = (width, taps_w, strides[1], dilation_rate[1], pad_w)
    return Geometry(
        batch,
        height,
        width,
        channels,
        multiplier,
        taps_h,
        taps_w,
        *strides,
        *dilation_rate,
        padding_before(*rows),
        padding_before(*columns),
        output_length(*rows),
        output_length(*columns),
    )
