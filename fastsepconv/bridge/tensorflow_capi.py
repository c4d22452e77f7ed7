"""TensorFlow's C API, as far as ops whose kernels are Numba functions need it.

Compiled code calls the functions of the first part by name; `connect` tells LLVM where they are. (Addresses written
into the code, as ctypes would have them, could not be cached on disk.) Python calls the rest through ctypes, to
register ops and to build a kernel's state. Names and arguments: tensorflow/c/{kernels,ops,tf_tensor,tf_status}.h.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from numba import types

OK, CANCELLED, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 1, 3, 8, 12, 13

_SYMBOLS: list[str] = []


def _external(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    _SYMBOLS.append(name)
    return types.ExternalFunction(name, result(*arguments))


_none, _address, _int, _long, _size = types.void, types.intp, types.int32, types.int64, types.uintp

new_status = _external("TF_NewStatus", _address)
delete_status = _external("TF_DeleteStatus", _none, _address)
get_code = _external("TF_GetCode", _int, _address)
set_status = _external("TF_SetStatus", _none, _address, _int, _address)

num_inputs = _external("TF_NumInputs", _int, _address)
get_input = _external("TF_GetInput", _none, _address, _int, _address, _address)
num_dims = _external("TF_NumDims", _int, _address)
dim = _external("TF_Dim", _long, _address, _int)
tensor_data = _external("TF_TensorData", _address, _address)
byte_size = _external("TF_TensorByteSize", _long, _address)
delete_tensor = _external("TF_DeleteTensor", _none, _address)
output_type = _external("TF_ExpectedOutputDataType", _int, _address, _int)
allocate_output = _external("TF_AllocateOutput", _address, _address, _int, _int, _address, _int, _size, _address)
context_failure = _external("TF_OpKernelContext_Failure", _none, _address, _address)
construction_failure = _external("TF_OpKernelConstruction_Failure", _none, _address, _address)

_in_context = (_none, _address, _address)
new_shape = _external("TF_NewShapeHandle", _address)
delete_shape = _external("TF_DeleteShapeHandle", _none, _address)
new_dimension = _external("TF_NewDimensionHandle", _address)
delete_dimension = _external("TF_DeleteDimensionHandle", _none, _address)
shape_input = _external("TF_ShapeInferenceContextGetInput", _none, _address, _int, _address, _address)
shape_output = _external("TF_ShapeInferenceContextSetOutput", _none, _address, _int, _address, _address)
shape_rank = _external("TF_ShapeInferenceContextRank", _long, _address, _address)
rank_known = _external("TF_ShapeInferenceContextRankKnown", _int, _address, _address)
with_rank = _external("TF_ShapeInferenceContextWithRank", *_in_context, _long, _address, _address)
shape_dim = _external("TF_ShapeInferenceContextDim", *_in_context, _long, _address)
dimension_known = _external("TF_DimensionHandleValueKnown", _int, _address)
dimension_value = _external("TF_DimensionHandleValue", _long, _address)
subshape = _external("TF_ShapeInferenceContextSubshape", *_in_context, _long, _long, _address, _address)
vector_of = _external("TF_ShapeInferenceContextVectorFromSize", _address, _address, _size)
concatenate = _external("TF_ShapeInferenceContextConcatenateShapes", *_in_context, _address, _address, _address)

_pointer, _text, _c_int = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_PYTHON_SIDE = {
    "TF_NewStatus": (_pointer,),
    "TF_DeleteStatus": (None, _pointer),
    "TF_GetCode": (_c_int, _pointer),
    "TF_Message": (_text, _pointer),
    "TF_SetStatus": (None, _pointer, _c_int, _text),
    "TF_NewOpDefinitionBuilder": (_pointer, _text),
    "TF_OpDefinitionBuilderAddInput": (None, _pointer, _text),
    "TF_OpDefinitionBuilderAddOutput": (None, _pointer, _text),
    "TF_OpDefinitionBuilderAddAttr": (None, _pointer, _text),
    "TF_OpDefinitionBuilderSetShapeInferenceFunction": (None, _pointer, _pointer),
    "TF_RegisterOpDefinition": (None, _pointer, _pointer),
    "TF_NewKernelBuilder": (_pointer, _text, _text, _pointer, _pointer, _pointer),
    "TF_KernelBuilder_TypeConstraint": (None, _pointer, _text, _c_int, _pointer),
    "TF_RegisterKernelBuilder": (None, _text, _pointer, _pointer),
    "TF_OpKernelConstruction_GetAttrInt64": (None, _pointer, _text, _pointer, _pointer),
    "TF_OpKernelConstruction_GetAttrInt64List": (None, _pointer, _text, _pointer, _c_int, _pointer),
    "TF_OpKernelConstruction_Failure": (None, _pointer, _pointer),
    "TF_ShapeInferenceContextSetUnknownShape": (None, _pointer, _pointer),
    "TF_NumInputs": (_c_int, _pointer),
    "TF_GetInput": (None, _pointer, _c_int, _pointer, _pointer),
    "TF_NumDims": (_c_int, _pointer),
    "TF_Dim": (ctypes.c_int64, _pointer, _c_int),
    "TF_TensorData": (_pointer, _pointer),
    "TF_DeleteTensor": (None, _pointer),
    "TF_ExpectedOutputDataType": (_c_int, _pointer, _c_int),
    "TF_AllocateOutput": (_pointer, _pointer, _c_int, _c_int, _pointer, _c_int, ctypes.c_size_t, _pointer),
    "TF_AllocateTemp": (_pointer, _pointer, _c_int, _pointer, _c_int, _pointer, _pointer),
    "TF_OpKernelContext_Failure": (None, _pointer, _pointer),
}


class Refusal(RuntimeError):
    """An error of TensorFlow's, in its own words, with its code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class CApi:
    """The functions that Python calls, as attributes without their prefix `TF_`, and C's `malloc` and `free`."""

    def __init__(self, library: ctypes.CDLL):
        self.libc = ctypes.CDLL(None)
        self.libc.malloc.restype, self.libc.malloc.argtypes = _pointer, [ctypes.c_size_t]
        for name, (result, *arguments) in _PYTHON_SIDE.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("TF_"), function)

    def __getattr__(self, name: str) -> Callable:
        raise AttributeError(f"TF_{name} is not declared")

    def checked(self, call: Callable, *arguments) -> Any:
        """What `call(*arguments, status)` returns; Refusal where the status is not OK."""
        status = self.NewStatus()
        try:
            result = call(*arguments, status)
            if self.GetCode(status) != OK:
                raise Refusal(self.GetCode(status), self.Message(status).decode(errors="replace"))
            return result
        finally:
            self.DeleteStatus(status)

    def fail_construction(self, construction: int, message: str) -> None:
        """Makes the building of a kernel end with a TensorFlow error."""
        self._fail(self.OpKernelConstruction_Failure, construction, INTERNAL, message)

    def fail_computation(self, context: int, code: int, message: str) -> None:
        """Makes a kernel's run end with a TensorFlow error."""
        self._fail(self.OpKernelContext_Failure, context, code, message)

    def _fail(self, how: Callable, where: int, code: int, message: str) -> None:
        status = self.NewStatus()
        self.SetStatus(status, code, message.encode())
        how(where, status)
        self.DeleteStatus(status)


def _library_path() -> str:
    import tensorflow as tf

    name = "libtensorflow_framework.2.dylib" if sys.platform == "darwin" else "libtensorflow_framework.so.2"
    return os.path.join(tf.sysconfig.get_lib(), name)


def connect() -> CApi:
    """Loads the C API and tells LLVM the addresses of its functions.

    Raises: OSError where the library is not there, AttributeError where a function is not in it.
    """
    library = ctypes.CDLL(_library_path())
    api = CApi(library)
    for name in _SYMBOLS:
        llvmlite.binding.add_symbol(name, address_of(getattr(library, name)))
    return api


def address_of(function) -> int:
    """Where a C function, as ctypes has it, lies in memory."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
