"""What the fast operations share: kernels made once a tile, started for given sizes, and the arrays they can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import partial_sums
from .launch import Kernel, Stream, made_once
from .memory import Operand
from .tiles import Launch, TiledKernel

ELEMENTS = ("float32", "bfloat16", "float16")
ALIGNMENT = 16  # bytes: the widest access
# Of an array, whose sizes kernels take in 32 bits. Those count rows a few tiles past the last one, of which an array of
# one column has as many as elements.
MOST_ELEMENTS = 2**31 - 2**10
LONGEST_ROW = 2**23  # elements: the 128 rows of a tile are told apart in 32 bits


class Made(NamedTuple):
    """A kernel for one dtype and tile, and how it is started for given sizes."""

    kernel: Kernel
    launch: Callable[..., Launch]


@made_once
def made(factory: Callable[..., TiledKernel], dtype: str, *tile: Any) -> Made:
    """The kernel that `factory(dtype, *tile)` describes, of the instructions that its tile names."""
    tiled = factory(dtype, *tile)
    kernel = Kernel(
        tiled.function,
        (dtype, *(part.name for part in tile)),
        tiled.signature.args,
        tier="fast",
        launch_bounds=tiled.launch_bounds,
        instructions=tiled.architecture,
    )
    return Made(kernel, tiled.launch)


def run(
    factory: Callable[..., TiledKernel], which: tuple, sizes: tuple[int, ...], stream: Stream, *arguments: Any
) -> None:
    """Launch the kernel that `factory(*which)` describes on the grid that follows from `sizes`."""
    kernel, launch = made(factory, *which)
    grid, threads, shared_bytes = launch(*sizes)
    kernel(grid, threads, stream, *arguments, shared_bytes=shared_bytes)


def add_partials(count: int, splits: int, partials: Operand, total: Operand, stream: Stream) -> None:
    """Fills total `[count]` with the sums of the columns of partials `[splits,count]`, which are float32."""
    run(partial_sums.add_partials, (total.element,), (count,), stream, partials.pointer, total.pointer, count, splits)


def takes(arguments: Iterable[Any]) -> bool:
    """Whether the operands among an operation's arguments have one element that kernels know, and lie on 16 bytes."""
    operands = [argument for argument in arguments if isinstance(argument, Operand)]
    element = operands[0].element
    return element in ELEMENTS and all(
        operand.element == element and operand.pointer % ALIGNMENT == 0 for operand in operands
    )


def spans(rows: int, *row_lengths: int) -> bool:
    """Whether arrays of so many rows of these lengths can be counted in 32 bits, and hold something."""
    return all(0 < rows * length <= MOST_ELEMENTS and length <= LONGEST_ROW for length in row_lengths)
