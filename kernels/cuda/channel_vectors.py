"""A few neighbouring channels of one pixel, as a thread holds them: loaded at once, computed in float32."""

from __future__ import annotations

from functools import cache

from numba import types

from . import ptx
from .fragments import inlined


def pointer(dtype: str) -> types.CPointer:
    """Half numbers are passed as their bits."""
    return types.CPointer(types.float32 if dtype == "float32" else types.uint16)


def register_count(dtype: str, width: int) -> int:
    """32-bit registers that hold `width` numbers."""
    return width if dtype == "float32" else width // 2


@cache
def loader(dtype: str, width: int):
    """load(registers, wanted, pointer, offset): `width` numbers as stored, in 8 or 16 bytes; zeros where unwanted."""
    instruction = ptx.load_global_128 if register_count(dtype, width) == 4 else ptx.load_global_64

    @inlined
    def load(registers, wanted, pointer, offset):
        instruction(registers, 0, wanted, pointer, offset)

    return load


@cache
def unpacker(dtype: str, width: int):
    """unpack(numbers, first, registers): numbers[first:first + width], float32, of what was loaded."""
    low, high = (ptx.low_bf16, ptx.high_bf16) if dtype == "bfloat16" else (ptx.low_f16, ptx.high_f16)
    pairs = width // 2

    @inlined
    def unpack_floats(numbers, first, registers):
        for i in range(width):
            numbers[first + i] = ptx.float_of(registers[i])

    @inlined
    def unpack_halves(numbers, first, registers):
        for i in range(pairs):
            numbers[first + 2 * i] = low(registers[i])
            numbers[first + 2 * i + 1] = high(registers[i])

    return unpack_floats if dtype == "float32" else unpack_halves


@cache
def packer(dtype: str, width: int):
    """pack(registers, numbers, first): as they are stored, each rounded once."""
    pair = ptx.pack_bf16 if dtype == "bfloat16" else ptx.pack_f16
    pairs = width // 2

    @inlined
    def pack_floats(registers, numbers, first):
        for i in range(width):
            registers[i] = ptx.bits_of(numbers[first + i])

    @inlined
    def pack_halves(registers, numbers, first):
        for i in range(pairs):
            registers[i] = pair(numbers[first + 2 * i], numbers[first + 2 * i + 1])

    return pack_floats if dtype == "float32" else pack_halves


@cache
def storer(dtype: str, width: int):
    """store(registers, wanted, pointer, offset)"""
    instruction = ptx.store_global_128 if register_count(dtype, width) == 4 else ptx.store_global_64

    @inlined
    def store(registers, wanted, pointer, offset):
        instruction(wanted, pointer, offset, registers, 0)

    return store
