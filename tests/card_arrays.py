"""Arrays that say they lie on a card, of a library that does not exist: their memory is NumPy's."""

from __future__ import annotations

import ctypes
import types

import ml_dtypes
import numpy as np

CUDA, HOST = 2, 1
_KINDS = {"float32": (2, 32), "float64": (2, 64), "float16": (2, 16), "bfloat16": (4, 16), "int32": (0, 32)}


class _Array:
    """What both kinds share: the memory, and a namespace as of the array API standard."""

    def __init__(self, array, *, card: int = 0, stream: int | None = 7, read_only: bool = False):
        self.array, self.device, self.stream, self.read_only = np.asarray(array), card, stream, read_only

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def shape(self):
        return self.array.shape

    def __array_namespace__(self):
        def empty(shape, dtype, device):
            return type(self)(np.full(shape, np.nan, dtype), card=device, stream=self.stream)

        def permute_dims(x, axes):
            return type(x)(x.array.transpose(axes), card=x.device, stream=x.stream)

        names = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
        return types.SimpleNamespace(empty=empty, permute_dims=permute_dims, bfloat16=ml_dtypes.bfloat16, **names)


class InterfaceArray(_Array):
    """Describes itself by `__cuda_array_interface__`, version 3."""

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, self.read_only),
            "strides": None if self.array.flags.c_contiguous else self.array.strides,
            "stream": self.stream,
            "version": 3,
        }


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class DLPackArray(_Array):
    """Describes itself by DLPack alone."""

    kind = CUDA
    asked_for = None

    def __dlpack_device__(self):
        return self.kind, self.device

    def __dlpack__(self, stream=None):
        type(self).asked_for = stream
        ndim = self.array.ndim
        shape, strides = (
            (ctypes.c_int64 * ndim)(*self.shape),
            (ctypes.c_int64 * ndim)(*(step // self.array.itemsize for step in self.array.strides)),
        )
        tensor = _Tensor(
            self.array.ctypes.data - 16, self.kind, self.device, ndim, *_KINDS[self.array.dtype.name], 1,
            ctypes.addressof(shape), ctypes.addressof(strides), 16, None, None,
        )  # fmt: skip
        self.kept = tensor, shape, strides  # for as long as the capsule may be read
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(tensor), b"dltensor", None)
