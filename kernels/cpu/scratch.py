"""Scratch memory that outlives the call that asked for it.

A kernel wants the same few blocks at every call. Freed, they would go back to the system, and each call would begin
with a page fault for every 4 KiB of them: 5 to 10 % of a small layer. So they are kept on a shelf, which any thread
may take from and give to without a lock. The shelf holds as many blocks as were ever used at once.

An exception would pass a caller by before it could give back its own blocks. So only what a kernel does first, and what
it does last (`require`), may raise; everything in between returns whether there was memory.
"""

from __future__ import annotations

import ctypes
import sys

import llvmlite.binding as llvm
from numba.core import types

from . import atomics
from .atomics import WORD_SIZE
from .jit import kernel
from .memory import size_of
from .simd import CACHE_LINE

SHELF_PLACES = 64
LARGEST_KEPT = 32 << 20  # bytes: a larger block is freed at once
NO_MEMORY = "no memory for a kernel's scratch space"
_HEADER = CACHE_LINE  # before the block: [the address that malloc gave, the block's size in bytes]

_shelf = (ctypes.c_int64 * SHELF_PLACES)()
_shelf_address = atomics.named_memory("fastsepconv_shelf", _shelf)
# The C library's, not Python's: those may want the GIL, which a thread that waits for this one may hold.
_c_library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
for _name in ("malloc", "free"):
    _function = getattr(_c_library, _name)
    llvm.add_symbol(f"fastsepconv_{_name}", ctypes.cast(_function, ctypes.c_void_p).value)

_malloc = types.ExternalFunction("fastsepconv_malloc", types.intp(types.intp))
free_memory = types.ExternalFunction("fastsepconv_free", types.void(types.intp))


@kernel
def try_take(dtype, length):
    """The address, on a cache line, of room for `length` elements with anything in them; 0 where there is no memory.

    Return it with `give`.
    """
    size = length * size_of(dtype)
    for place in range(SHELF_PLACES):
        block = atomics.exchange(_place(place), 0)
        if block != 0:
            if atomics.load(block - _HEADER + WORD_SIZE) >= size:
                return block
            free(block)  # too small now: the shelf forgets it for the larger one
            break
    return allocate(size)


@kernel
def allocate(size):
    """The address, on a cache line, of `size` bytes that are not from the shelf; 0 where there is no memory.

    Return them with `free`.
    """
    start = _malloc(size + 2 * CACHE_LINE + _HEADER)
    if start == 0:
        return 0
    block = (start + _HEADER + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    atomics.store(block - _HEADER, start)
    atomics.store(block - _HEADER + WORD_SIZE, size)
    return block


@kernel
def take(dtype, length):
    """As `try_take`, for a caller that holds no other block.

    Raises:
        MemoryError: there is no memory.
    """
    block = try_take(dtype, length)
    require(block != 0)
    return block


@kernel
def take_in_share(dtype, length, lacking):
    """As `try_take`, for a share of parallel work, through which no exception passes: it sets the word at `lacking`."""
    block = try_take(dtype, length)
    if block == 0:
        atomics.store(lacking, 1)
    return block


@kernel
def require(had_memory):
    """When all blocks have been given back.

    Raises:
        MemoryError: it was not so.
    """
    if not had_memory:
        raise MemoryError(NO_MEMORY)


@kernel
def give(block):
    """Returns what `take` gave."""
    if atomics.load(block - _HEADER + WORD_SIZE) <= LARGEST_KEPT:
        for place in range(SHELF_PLACES):
            if atomics.replace(_place(place), 0, block):
                return
    free(block)


@kernel
def free(block):
    """Returns what `allocate` gave."""
    free_memory(atomics.load(block - _HEADER))


@kernel
def _place(number):
    return _shelf_address() + number * WORD_SIZE
