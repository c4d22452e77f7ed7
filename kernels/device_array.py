"""An array in the memory of a card as kernels are given it: a description, which holds on to the caller's array."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

_ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Dtype(NamedTuple):
    """A dtype by its name: NumPy has none for bfloat16."""

    name: str

    @property
    def itemsize(self) -> int:
        return _ITEM_SIZES[self.name]


class DeviceArray(NamedTuple):
    """An array in the memory of a card: where it lies, how, and what it is an array of."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: Dtype
    device: int
    stream: int
    writable: bool
    owner: Any  # the caller's array

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def end(self) -> int:
        """The address behind a contiguous array's last element."""
        return self.address + math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the order of their indices, without gaps."""
        steps = zip(self.shape, self.strides, contiguous_strides(self.shape), strict=True)
        return math.prod(self.shape) == 0 or all(size == 1 or ours == dense for size, ours, dense in steps)

    def transpose(self, *axes: int) -> DeviceArray:
        """The same elements with the axes in this order."""
        return self._replace(
            shape=tuple(self.shape[axis] for axis in axes), strides=tuple(self.strides[axis] for axis in axes)
        )

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements, which are contiguous, in another shape; one size may be -1."""
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        known = math.prod(size for size in sizes if size != -1)
        rest = math.prod(self.shape) // known if known else 0
        resolved = tuple(rest if size == -1 else size for size in sizes)
        return self._replace(shape=resolved, strides=contiguous_strides(resolved))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
