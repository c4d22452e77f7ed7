"""The element types of the kernels: how each lies in memory, how it is read and written, what its sums are held in.

float32 and float64 are computed as they are. float16 and bfloat16 are only stored: a kernel reads them into float32,
sums in float32 and rounds once, when it writes. bfloat16, which neither NumPy nor Numba knows, is the upper half of a
float32: kernels see its 16 bits as an unsigned integer.

In Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, set before Numba is imported) the same kernels run as Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda, types

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:

    def device_function(function: Callable) -> Callable:
        """A function that kernels call: in the simulator, the function."""
        return function

    def _float_of(bits):
        return np.uint32(bits).view(np.float32)

    def _bits_of(value):
        return np.float32(value).view(np.uint32)

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    # Inlined as Python, so that kernels can be compiled where no card is: a call would ask for the current card.
    device_function = cuda.jit(device=True, inline="always")

    @intrinsic
    def _float_of(typing_context, bits):
        """The float32 with these bits."""
        return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())

    @intrinsic
    def _bits_of(typing_context, value):
        """The bits of a float32."""
        return types.uint32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


class Element(NamedTuple):
    """One element type; `load(pointer, i)` and `store(pointer, i, value)` are called by kernels."""

    name: str
    dtype: np.dtype  # of its words in memory
    pointer: types.Type
    sum: str  # the element that holds its sums
    load: Callable[[Any, int], Any]
    store: Callable[[Any, int, Any], None]


@device_function
def _load(pointer, i):
    return pointer[i]


@device_function
def _store(pointer, i, value):
    pointer[i] = value


@device_function
def _load_float16(pointer, i):
    return np.float32(pointer[i])


@device_function
def _store_float16(pointer, i, value):
    pointer[i] = np.float16(value)


@device_function
def _load_bfloat16(pointer, i):
    return _float_of(np.uint32(pointer[i]) << 16)


@device_function
def _store_bfloat16(pointer, i, value):
    """Rounds to the nearest, to the even one of two; what is no number stays none."""
    bits = _bits_of(value)
    if value != value:
        pointer[i] = np.uint16((bits >> 16) | 64)
    else:
        pointer[i] = np.uint16((bits + 32767 + ((bits >> 16) & 1)) >> 16)


def _element(name: str, words: str, sums: str, load: Callable, store: Callable) -> Element:
    dtype = np.dtype(words)
    return Element(name, dtype, types.CPointer(getattr(types, words)), sums, load, store)


ELEMENTS = {
    element.name: element
    for element in (
        _element("float32", "float32", "float32", _load, _store),
        _element("float64", "float64", "float64", _load, _store),
        _element("float16", "float16", "float32", _load_float16, _store_float16),
        _element("bfloat16", "uint16", "float32", _load_bfloat16, _store_bfloat16),
    )
}


def sums_of(*names: str) -> str:
    """The element that holds sums of products of these elements."""
    return "float64" if "float64" in names else "float32"


def scalar(name: str) -> types.Type:
    """The type of a number that a kernel is given, such as a bound."""
    return getattr(types, name)


@device_function
def clamped(value, low, high):
    """`value` held between `low` and `high`; what is no number stays none."""
    if value < low:
        return low
    if value > high:
        return high
    return value
