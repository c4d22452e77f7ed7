"""An operation's attributes, and the shape of its result, also while a graph is built and sizes are unknown (None).

Checks what can be checked by then, in the words of `checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from ..kernels.geometry import output_length

Shape = tuple[int | None, ...]
Attributes = dict[str, Any]


def window(strides, padding, dilation_rate) -> Attributes:
    """The attributes of an operation that moves a window; ValueError where an argument is wrong."""
    padding = checks.padding(padding)
    return {
        "strides": checks.positive_pair("strides", strides),
        "dilations": checks.positive_pair("dilation_rate", dilation_rate),
        "same": int(padding == "same"),
        "padding": (0, 0, 0, 0) if isinstance(padding, str) else tuple(zeros for pair in padding for zeros in pair),
    }


def static_shape(tensor) -> Shape | None:
    """The shape of a TensorFlow tensor as far as it is known; None where not even its rank is."""
    return None if tensor.shape.rank is None else tuple(tensor.shape)


def by_name(attributes: Sequence) -> Attributes:
    """Attributes from alternating names and values."""
    return dict(zip(attributes[::2], attributes[1::2], strict=True))


def output_shape(shapes: Sequence[Shape | None], bias: Shape | None, attributes: Attributes) -> Shape:
    """`[N,P,Q,F]` for the shapes of x and of the kernels; a shape itself is None where not even its rank is known.

    `attributes` are the op's; those of a pointwise convolution name no window.

    Raises:
        ValueError: a rank or a size is wrong, and known.
    """
    shapes = list(shapes)
    batch, height, width, channels = _ranked("x", shapes.pop(0), 4)
    if "strides" in attributes:
        taps_h, taps_w, kernel_channels, multiplier = _ranked("depthwise_kernel", shapes.pop(0), 4, least=1)
        _same("depthwise_kernel", "input channels, as x has", kernel_channels, channels)
        height, width = _length(0, height, taps_h, attributes), _length(1, width, taps_w, attributes)
        known = kernel_channels if channels is None else channels
        channels = known * multiplier if known and multiplier else None
    if shapes:
        channels = _pointwise(shapes.pop(), channels)
    _same("bias", "elements, one for each filter", _ranked("bias", bias, 1)[0], channels)
    return batch, height, width, channels


def _pointwise(shape: Shape | None, depth: int | None) -> int | None:
    *ones, kernel_depth, filters = _ranked("pointwise_kernel", shape, 2 if shape and len(shape) == 2 else 4, least=1)
    if any(one not in (1, None) for one in ones):
        raise checks.invalid("pointwise_kernel", "shape (1, 1, depth, filters)", shape, ".shape")
    _same("pointwise_kernel", "input channels", kernel_depth, depth)
    return filters


def _ranked(name: str, shape: Shape | None, rank: int, least: int = 0) -> Shape:
    if shape is None:
        return (None,) * rank
    if len(shape) != rank or any(size is not None and size < least for size in shape):
        raise checks.invalid(name, f"{rank} dimensions" + (", none of them empty" if least else ""), shape, ".shape")
    return shape


def _same(name: str, what: str, size: int | None, expected: int | None) -> None:
    if None not in (size, expected) and size != expected:
        raise checks.invalid(name, f"{expected} {what}", size)


def _length(axis: int, size: int | None, taps: int | None, attributes: Attributes) -> int | None:
    stride, dilation = attributes["strides"][axis], attributes["dilations"][axis]
    before, after = attributes["padding"][2 * axis : 2 * axis + 2]
    if size is not None and attributes["same"]:
        return output_length(size, 1, stride, dilation, "same")
    if size is None or taps is None:
        return None
    if size + before + after - (taps - 1) * dilation - 1 + 2 * stride <= 0:
        fits = f"a kernel that fits into the padded image, here {size + before + after} pixels along axis {axis + 1}"
        raise checks.invalid("depthwise_kernel", fits, taps, f".shape[{axis}]")
    return output_length(size, taps, stride, dilation, (before, after))
