"""Arrays as kernels are given them, and the memory of the card that a call needs for itself.

A kernel takes an array by its pointer: an address on a card; in the simulator, which has no memory of its own, a flat
array behind the same brackets.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..device_array import DeviceArray
from . import driver
from .driver import Stream
from .elements import ELEMENTS, SIMULATED


class Operand(NamedTuple):
    """An array: its pointer and the name of its element."""

    pointer: Any
    element: str


class SimulatedPointer:
    """A flat array that can be read and written within its bounds, and nowhere else."""

    __slots__ = ("words",)

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def __getitem__(self, i: int):
        return self.words[self._checked(i)]

    def __setitem__(self, i: int, value) -> None:
        self.words[self._checked(i)] = value

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self.words):
            raise IndexError(f"element {i} of {len(self.words)}")
        return i


# Stands where there is no bias: never read.
ABSENT = Operand(SimulatedPointer(np.empty(0)) if SIMULATED else 0, "")


_lent = threading.local()  # .room: where the thread's calls have their memory from, if not from the driver


@contextlib.contextmanager
def room_from(room: Callable[[int], int]) -> Iterator[None]:
    """Within it what the thread's calls need for themselves comes from `room(bytes)`, an address on their card.

    The memory has to be free when the work runs that is put into the calls' stream from then on, and to stay until that
    of the calls is done.
    """
    before, _lent.room = getattr(_lent, "room", None), room
    try:
        yield
    finally:
        _lent.room = before


@contextlib.contextmanager
def scratch(count: int, element: str, stream: Stream) -> Iterator[Operand]:
    """Room for `count` elements, until what was put into the stream meanwhile is done."""
    dtype = ELEMENTS[element].dtype
    room = getattr(_lent, "room", None)
    if room and count:
        yield _operand_at(room(count * dtype.itemsize), count, element)
        return
    if SIMULATED:
        yield Operand(SimulatedPointer(np.full(count, np.nan, dtype)), element)
        return
    address = driver.allocate(count * dtype.itemsize, "intermediate results, which grow with `x`", stream)
    try:
        yield Operand(address, element)
    finally:
        driver.free(address, stream)


def run(body: Callable[..., None], inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """`body(*operands, stream)`, the operands those of the inputs and outputs, by name, in this order; None stays None.

    NumPy arrays are copied to the card and, for outputs, back: all is done when this returns. Arrays on the card
    (`device_array.DeviceArray`) are used where they are, on their stream: the work is only put there.
    """
    arrays = (*inputs.values(), *outputs.values())
    first = next(array for array in arrays if array is not None)
    if not isinstance(first, np.ndarray):
        stream = _stream_of(first)
        with driver.turned_to(stream.device):
            body(*map(_operand_of, arrays), stream)
    elif SIMULATED:
        stream = driver.own_stream(driver.SIMULATOR)
        body(*(None if array is None else _simulated(array) for array in arrays), stream)
    else:
        on = driver.first_device()
        with driver.turned_to(on):
            _run_copied(body, inputs, outputs, driver.own_stream(on))


def _run_copied(
    body: Callable[..., None], inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Stream
) -> None:
    with contextlib.ExitStack() as held:
        operands = [_copied(name, array, held, stream) for name, array in inputs.items()]
        targets = [_room_for(name, array, held, stream) for name, array in outputs.items()]
        body(*operands, *targets, stream)
        for array, target in zip(outputs.values(), targets, strict=True):
            if target is not None:
                driver.copy_out(array.ctypes.data, target.pointer, array.nbytes, stream)
    driver.synchronize(stream, "Computing on the card")


def _room_for(name: str, array: Any, held: contextlib.ExitStack, stream: Stream) -> Operand | None:
    if array is None:
        return None
    address = driver.allocate(array.nbytes, f"`{name}`, of shape {array.shape}", stream)
    held.callback(driver.free, address, stream)
    return Operand(address, array.dtype.name)


def _copied(name: str, array: Any, held: contextlib.ExitStack, stream: Stream) -> Operand | None:
    operand = _room_for(name, array, held, stream)
    if operand is not None:
        driver.copy_in(operand.pointer, array.ctypes.data, array.nbytes, stream)
    return operand


def _simulated(array: np.ndarray) -> Operand:
    name = array.dtype.name
    return Operand(SimulatedPointer(array.reshape(-1).view(ELEMENTS[name].dtype)), name)


def _stream_of(array: DeviceArray) -> Stream:
    if SIMULATED:
        return driver.own_stream(driver.SIMULATOR)
    return Stream(array.stream, driver.device(array.device))


def _operand_of(array: DeviceArray | None) -> Operand | None:
    if array is None:
        return None
    return _operand_at(array.address, math.prod(array.shape), array.dtype.name)


def _operand_at(address: int, count: int, element: str) -> Operand:
    """`count` elements at an address on the card, which in the simulator is one of the computer's own."""
    if not SIMULATED:
        return Operand(address, element)
    words = ELEMENTS[element].dtype
    memory = np.empty(0, np.uint8)
    if count:
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (count * words.itemsize)).from_address(address))
    return Operand(SimulatedPointer(memory.view(words)), element)
