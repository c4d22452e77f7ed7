"""Tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """How a kernel is started for given sizes."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int  # dynamic; above 48 KB the launch has to ask the driver for it


class Kernel(NamedTuple):
    """A kernel for one dtype and tile, not compiled yet."""

    function: Callable[..., None]
    signature: Any  # Numba's
    launch_bounds: tuple[int, int]  # threads a block, blocks that shall fit a multiprocessor
    launch: Callable[..., Launch]


class GemmTile(NamedTuple):
    """A block's tile of a matrix product."""

    name: str
    rows: int
    columns: int
    warp_rows: int  # warps along the rows
    warp_columns: int
    stages: int
    blocks: int
    copy_bytes: int
    reason: str

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
    def sums(self) -> int:
        return 4 * self.row_tiles * self.column_tiles

    def count(self, rows: int, columns: int) -> int:
        return -(-rows // self.rows) * -(-columns // self.columns)
