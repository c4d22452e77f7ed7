"""What an array says of itself through DLPack: read from the structure in its capsule, nothing taken over or copied."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from . import checks

CUDA, CUDA_MANAGED = 2, 13  # kinds of memory
_FLOAT, _BFLOAT = 2, 4  # kinds of numbers
_NAMES = {(_FLOAT, 16): "float16", (_BFLOAT, 16): "bfloat16", (_FLOAT, 32): "float32", (_FLOAT, 64): "float64"}


class Described(NamedTuple):
    """An array by its description. `strides` are in elements (None: contiguous); `device`, `stream` None: not told."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    writable: bool
    device: int | None
    stream: int | None


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, with which a DLManagedTensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def is_on_card(value: Any) -> bool:
    """Whether an array offers DLPack, and says that it lies in the memory of a card."""
    try:
        return value.__dlpack_device__()[0] in (CUDA, CUDA_MANAGED)
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
        return False


def read(name: str, value: Any, stream: int) -> Described:
    """The array as it describes itself; work put into `stream` from now on finds it computed."""
    try:
        capsule = value.__dlpack__(stream=stream)
        tensor = _Tensor.from_address(_address_in(capsule))
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        expected = f"an array that can be used ({error})"
        raise checks.invalid(name, expected, type(value), " of type", TypeError) from error
    dtype = _NAMES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        expected = "an array of dtype " + ", ".join(checks.FLOAT_NAMES)
        raise checks.invalid(
            name, expected, (tensor.code, tensor.bits, tensor.lanes), " with DLPack's dtype", TypeError
        )
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return Described(address, shape, strides, dtype, True, tensor.device_id, stream)


def _address_in(capsule: Any) -> int:
    """The address in a capsule. It keeps its name, so that its own end frees what it holds."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return get(capsule, b"dltensor")
