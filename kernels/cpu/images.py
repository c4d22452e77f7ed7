"""A few images of a batch at a time, so that the scratch memory of a backward pass does not grow with the batch."""

from __future__ import annotations

from ..geometry import Geometry
from .jit import kernel
from .memory import ceil_div, size_of


@kernel
def of_images(g, count):
    """The geometry of `count` images of g."""
    return Geometry(
        count, g.height, g.width, g.channels, g.multiplier, g.kernel_height, g.kernel_width,
        g.stride_height, g.stride_width, g.dilation_height, g.dilation_width, g.pad_top, g.pad_left,
        g.out_height, g.out_width,
    )  # fmt: skip


@kernel
def images_at_once(dtype, g, size):
    """Images whose mid fits into `size` bytes, at least one: so many that the parts of the batch are about equal."""
    image_bytes = g.out_height * g.out_width * g.channels * size_of(dtype)
    most = max(1, size // max(1, image_bytes))
    return ceil_div(g.batch, max(1, ceil_div(g.batch, most)))
