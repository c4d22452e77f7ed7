"""Launching kernels: compiled once a capability, kept on the disk, started by address with no more host work than that.

A kernel is a Python function whose parameters have types given once: `CPointer` for arrays, which are raw addresses on
a card and flat arrays in the simulator, integers and floats, and `GEOMETRY`, whose fields it reads by name. Launching
one packs its arguments and calls the driver, on the stream that is given. It does not wait, so that a launch can be
captured into a CUDA graph, once an earlier one has loaded the kernel. With FASTSEPCONV_DEBUG=1 it does wait, and an
error in a kernel is raised where that was launched. Which kernels have been launched on a card, the README tells.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from numba import cuda, types

from ..geometry import Geometry
from . import binaries, driver
from .driver import Stream
from .elements import SIMULATED

DEBUG = os.environ.get("FASTSEPCONV_DEBUG") == "1"
GEOMETRY = types.NamedUniTuple(types.int64, len(Geometry._fields), Geometry)
THREADS = 256
MOST_BLOCKS = 2**20  # further elements are reached by striding over the grid
SIMULATED_GRID = (2, 3)  # blocks and threads: the simulator makes a thread of the system's for each, and few are enough

log = logging.getLogger("fastsepconv.cuda")
# Told the name of each kernel as it is launched.
listeners: list[Callable[[str], None]] = []
# Every kernel that was made in this process, by its name.
KERNELS: dict[str, Kernel] = {}
_FORMATS = {types.int32: "i", types.int64: "q", types.float32: "f", types.float64: "d"}
_making = threading.RLock()
Made = TypeVar("Made")
_simulator = threading.Lock()  # it runs one kernel at a time, and says so by an assertion


class _Loaded(NamedTuple):
    """A kernel on a card: what keeps it there, its handle, and the dynamic shared memory that a block may ask for."""

    library: Any
    handle: int
    shared_limit: int


class Kernel:
    """A kernel, compiled when a card first needs it."""

    def __init__(
        self,
        function: Callable,
        elements: tuple[str, ...],
        parameters: tuple[types.Type, ...],
        *,
        tier: str = "plain",
        launch_bounds: int | tuple[int, ...] | None = None,
        instructions: tuple[int, int] | tuple[int, int, str] | None = None,
    ) -> None:
        """The kernel `function` for arrays of these `elements`, by which its name tells it apart from its sisters.

        Args:
            elements: names of elements; of a kernel with a tile, that of the tile behind them.
            parameters: the types of the function's parameters, in their order.
            tier: "plain" or "fast", for the log.
            launch_bounds: the most threads of a block, or that and the least blocks of a multiprocessor.
            instructions: the capability whose instructions its PTX holds, on all cards; with a letter, such as
                (9, 0, "a"), on cards of that capability alone; None: those of the card.
        """
        self.function = function
        self.name = f"{function.__name__}[{','.join(elements)}]"
        self.parameters = parameters
        self.tier = tier
        self.launch_bounds = launch_bounds
        self.instructions = instructions
        if self.name in KERNELS:
            raise ValueError(f"There are two kernels of the name {self.name}.")
        KERNELS[self.name] = self
        self._simulated: Any = cuda.jit(function) if SIMULATED else None
        self._packers = threading.local()
        self._loaded: dict[int, _Loaded] = {}  # by the card's number
        self._compiling = threading.Lock()

    def over(self, count: int, stream: Stream, *arguments: Any) -> None:
        """Launch with a thread for each of `count` elements; none at all for none."""
        if count > 0:
            self(min(-(-count // THREADS), MOST_BLOCKS), THREADS, stream, *arguments)

    def __call__(
        self, blocks: int | tuple, threads: int | tuple, stream: Stream, *arguments: Any, shared_bytes: int = 0
    ) -> None:
        """Launch with these arguments: `blocks` and `threads` are numbers, or up to three of them.

        `shared_bytes` is the dynamic shared memory of a block.
        In the simulator the grid is always SIMULATED_GRID: a kernel that runs there strides over its grid.
        """
        if listeners or log.isEnabledFor(logging.DEBUG):
            self._tell(blocks, threads)
        if SIMULATED:
            return self._simulate(arguments)
        on = stream.device
        loaded = self._loaded.get(on.ordinal) or self._load(on)
        if shared_bytes > loaded.shared_limit:
            loaded = self._allow(on, shared_bytes)
        packer = getattr(self._packers, "packer", None)
        if packer is None:
            packer = self._packers.packer = Packer(self.parameters)
        grid = blocks if type(blocks) is tuple else (blocks,)
        block = threads if type(threads) is tuple else (threads,)
        (status,) = driver.api.cuLaunchKernel(
            loaded.handle,
            *grid, *_ONES[len(grid)],
            *block, *_ONES[len(block)],
            shared_bytes, stream.handle, packer.pack(arguments), 0,
        )  # fmt: skip
        if status:
            driver.call(f"Launching {self.name} on {blocks} blocks of {threads} threads", lambda: (status,))
        if DEBUG and not driver.is_capturing(stream):
            driver.synchronize(stream, f"Running {self.name}")

    def _tell(self, blocks: int | tuple, threads: int | tuple) -> None:
        log.debug("%s of the %s tier on %s blocks of %s threads", self.name, self.tier, blocks, threads)
        for listener in list(listeners):
            listener(self.name)

    def _load(self, on: driver.Device) -> _Loaded:
        with self._compiling:
            if on.ordinal not in self._loaded:
                binary = binaries.get(self, on.capability)
                self._loaded[on.ordinal] = _Loaded(*driver.load(binary.code, binary.entry), driver.SHARED_UNASKED)
            return self._loaded[on.ordinal]

    def _allow(self, on: driver.Device, shared_bytes: int) -> _Loaded:
        """Ask for more shared memory than any launch on this card has had."""
        with self._compiling:
            loaded = self._loaded[on.ordinal]
            if shared_bytes > loaded.shared_limit:
                driver.allow_shared_memory(loaded.handle, shared_bytes, on)
                loaded = self._loaded[on.ordinal] = loaded._replace(shared_limit=shared_bytes)
            return loaded

    def _simulate(self, arguments: tuple) -> None:
        with _simulator, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy's scalars, which overflow and divide as a card does
            self._simulated[SIMULATED_GRID](*arguments)


_ONES = ((), (1, 1), (1,), ())  # what a grid of so many sizes lacks


def made_once(factory: Callable[..., Made]) -> Callable[..., Made]:
    """A function that makes kernels, each of them once, whichever threads ask for it at the same time."""
    cached = functools.cache(factory)

    @functools.wraps(factory)
    def make(*which: Any) -> Made:
        with _making:
            return cached(*which)

    return make


class Packer:
    """The arguments of a kernel as the driver reads them: an array of addresses, one for each value."""

    def __init__(self, parameters: tuple[types.Type, ...]) -> None:
        formats, self._tuples = "", []
        for position, parameter in enumerate(parameters):
            if isinstance(parameter, types.BaseTuple):
                self._tuples.append(position)
                formats += "".join(map(_format, parameter))
            else:
                formats += _format(parameter)
        self._tuples.reverse()
        self._pack = struct.Struct(formats).pack_into
        self._values = ctypes.create_string_buffer(struct.calcsize(formats))
        start = ctypes.addressof(self._values)
        ends = [struct.calcsize(formats[: i + 1]) for i in range(len(formats))]
        places = [start + end - struct.calcsize(one) for end, one in zip(ends, formats, strict=True)]
        self._addresses = (ctypes.c_void_p * len(places))(*places)
        self._address = ctypes.addressof(self._addresses)

    def pack(self, arguments: tuple) -> int:
        """The address of the addresses of these arguments, which stay until the next call."""
        if self._tuples:
            flat = list(arguments)
            for position in self._tuples:
                flat[position : position + 1] = flat[position]
            self._pack(self._values, 0, *flat)
        else:
            self._pack(self._values, 0, *arguments)
        return self._address


def _format(parameter: types.Type) -> str:
    return "Q" if isinstance(parameter, types.CPointer) else _FORMATS[parameter]
