"""The ops as TensorFlow knows them: their definitions, and kernels that compile themselves when first needed.

A kernel is registered with three functions. TensorFlow calls `create` once for each node that will run: it compiles
what the node needs, or loads it from the disk, and writes the node's attributes into a block of memory, the state. It
calls `compute` at each run: that jumps to the compiled function, whose address is the state's first word, and `delete`
at the end. So an operation costs nothing until a node uses it, whatever made the node: this package, or a SavedModel.
The kernels for tensors on a card are those of `tensorflow_card`, made the same way.

All are machine code. `create` has Python do its work, but does not take Python's word for it: Ctrl-C may raise
KeyboardInterrupt before the first line of a Python callback, and ctypes then returns whatever was in memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from tensorflow.python.framework import op_def_registry

from .. import checks
from ..kernels.cpu import threads
from ..kernels.cpu.jit import Callback, callback
from ..kernels.cpu.memory import view
from ..kernels.cpu.scratch import free_memory
from ..kernels.cpu.simd import BFLOAT16
from . import tensorflow_kept as kept
from . import tensorflow_kernels as kernels
from . import tensorflow_shapes as shapes
from . import tensorflow_state as word
from .tensorflow_capi import CANCELLED, CApi, address_of, connect, construction_failure, delete_status, new_status
from .tensorflow_tensors import fail, out_of_memory

CALLBACK = types.void(types.intp, types.intp)
DTYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.float64}  # TF_FLOAT, TF_DOUBLE
FORWARD_DTYPES = DTYPES | {14: BFLOAT16}  # TF_BFLOAT16
_SPELLED = {np.float32: "float", np.float64: "double", BFLOAT16: "bfloat16"}
HOST, CARD = "CPU", "GPU"  # TensorFlow's names for kinds of devices; the tests without a card exchange them
_CREATE = types.intp(types.intp)
_MAX_ATTRIBUTE = 2**31 - 1


class Attribute(NamedTuple):
    """An attribute of integers, and where in a node's state it lies."""

    word: int
    length: int
    least: int = 0
    default: int | None = None

    @property
    def spec(self) -> str:
        """Its type and default, as TensorFlow spells them."""
        default = "" if self.default is None else f" = {self.default}"
        return (f"int >= {self.least}" if self.length == 1 else f"list(int) >= {self.length}") + default


_WINDOW = {
    "strides": Attribute(word.STRIDES, 2, least=1),
    "dilations": Attribute(word.DILATIONS, 2, least=1),
    "same": Attribute(word.SAME, 1),
    "padding": Attribute(word.PADDING, 4),
}
_WANTED = {"wanted": Attribute(word.WANTED, 1)}
_RELU = {"relu": Attribute(word.RELU, 1, default=0)}
_RELU_X = {"relu_x": Attribute(word.RELU_X, 1, default=0)}
_PRODUCT = {"keep": Attribute(word.KEEP, 1, default=0), "residuals": Attribute(word.RESIDUALS, 1, default=0)}
FROZEN = frozenset(_RELU | _RELU_X | _PRODUCT)  # the attributes that `tensorflow_freeze` alone sets
_BIAS, _RESIDUAL = "bias: biases * T", "residual: residuals * T"  # at most one of each


class Definition(NamedTuple):
    """An op: its inputs and outputs, all of dtype T, its attributes, and the functions behind it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]
    compute: Dispatcher
    infer_shape: Dispatcher | None = None

    @property
    def lists(self) -> tuple[str, ...]:
        """The attributes that tell the lengths of the inputs that are lists. They come last."""
        return tuple(spec.split(" ")[1] for spec in self.inputs if "*" in spec)


DEFINITIONS = {
    "FastsepconvDepthwise": Definition(
        ("x: T", "depthwise_kernel: T", _BIAS),
        ("y: T",),
        _WINDOW | _RELU | _RELU_X,
        kernels.depthwise_forward,
        shapes.depthwise,
    ),
    "FastsepconvDepthwiseGrad": Definition(
        ("x: T", "depthwise_kernel: T", "dy: T"),
        ("d_x: T", "d_depthwise: T", "d_bias: T"),
        _WINDOW | _WANTED,
        kernels.depthwise_backward,
    ),
    "FastsepconvPointwise": Definition(
        ("x: T", "pointwise_kernel: T", _BIAS, _RESIDUAL),
        ("y: T",),
        _RELU | _PRODUCT,
        kernels.pointwise_forward,
        shapes.pointwise,
    ),
    "FastsepconvPointwiseGrad": Definition(
        ("x: T", "pointwise_kernel: T", "dy: T"),
        ("d_x: T", "d_pointwise: T", "d_bias: T"),
        _WANTED,
        kernels.pointwise_backward,
    ),
    "FastsepconvSeparable": Definition(
        ("x: T", "depthwise_kernel: T", "pointwise_kernel: T", _BIAS, _RESIDUAL),
        ("y: T",),
        _WINDOW | _RELU | _RELU_X | _PRODUCT,
        kernels.separable_forward,
        shapes.separable,
    ),
    "FastsepconvSeparableGrad": Definition(
        ("x: T", "depthwise_kernel: T", "pointwise_kernel: T", "dy: T"),
        ("d_x: T", "d_depthwise: T", "d_pointwise: T", "d_bias: T"),
        _WINDOW | _WANTED,
        kernels.separable_backward,
    ),
}


@intrinsic
def _jump(typing_context, function, state, context_address):
    def codegen(context, builder, signature, arguments):
        address = context.get_value_type(types.intp)
        kind = ir.FunctionType(ir.VoidType(), [address, address])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@callback(CALLBACK)
def _compute(state, context):
    _jump(view(np.int64, state, 1)[0], state, context)


@callback(types.void(types.intp))
def _delete(state):
    if state != 0:  # a node that could not be made has none
        kept.release(state)
        free_memory(state)


_makers: list[Callable[[int], int | None]] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))
def _make_state(maker: int, construction: int, state: ctypes._Pointer) -> None:
    state[0] = _makers[maker](construction) or 0


llvmlite.binding.add_symbol("fastsepconv_make_state", address_of(_make_state))
_make_state_in = types.ExternalFunction("fastsepconv_make_state", types.void(types.intp, types.intp, types.intp))


def _create(maker: int) -> Callback:
    """What TensorFlow calls to make a node's kernel, for the maker of that number."""

    def create(construction):
        state = np.zeros(1, np.int64)
        _make_state_in(maker, construction, state.ctypes.data)
        if state[0] == 0:  # an error that the maker has told already stands: TensorFlow keeps the first
            status = new_status()
            fail(status, CANCELLED, "interrupted while a kernel of fastsepconv was made", ())
            construction_failure(construction, status)
            delete_status(status)
        return state[0]

    return callback(_CREATE)(create)


@functools.cache
def _compiled(function: Dispatcher, dtype: type) -> int:
    """Address of `function` compiled for `dtype`."""

    def compute(state, context):
        try:
            function(dtype, state, context)
        except Exception:
            out_of_memory(context)

    return callback(CALLBACK)(compute).address


@functools.cache
def _compiled_shape(function: Dispatcher) -> int:
    return callback(CALLBACK)(function.py_func).address


def compile_op(name: str, dtype: type) -> int:
    """Compiles what the op `name` runs for `dtype`, or loads it from the disk; the address of the machine code."""
    with global_compiler_lock:
        threads.ensure_started()
        return _compiled(DEFINITIONS[name].compute, dtype)


def register() -> CApi:
    """Registers all ops with TensorFlow, and their kernels for the CPU, once a process.

    Raises: OSError or AttributeError where this TensorFlow has no such C API; RuntimeError with its own words where
    it does not take a definition.
    """
    api = connect()
    threads.ensure_started()
    for name, definition in DEFINITIONS.items():
        if op_def_registry.get(name) is None:  # to define an op twice ends the process
            _register_op(api, name, definition)
            for code, dtype in _dtypes(name).items():
                function = functools.partial(compile_op, name, dtype)
                register_kernel(api, name, HOST, code, _compute, function)
    return api


def _dtypes(name: str) -> dict[int, type[np.generic]]:
    """What the op of that name takes: TensorFlow's numbers of dtypes, and what the kernels know them as."""
    return DTYPES if name.endswith("Grad") else FORWARD_DTYPES


def _register_op(api: CApi, name: str, definition: Definition) -> None:
    builder = api.NewOpDefinitionBuilder(name.encode())
    for spec in definition.inputs:
        api.OpDefinitionBuilderAddInput(builder, spec.encode())
    for spec in definition.outputs:
        api.OpDefinitionBuilderAddOutput(builder, spec.encode())
    attributes = [f"T: {{{', '.join(_SPELLED[dtype] for dtype in _dtypes(name).values())}}}"]
    attributes += ["biases: int >= 0"] if _BIAS in definition.inputs else []
    attributes += [f"{attribute}: {layout.spec}" for attribute, layout in definition.attributes.items()]
    for spec in attributes:
        api.OpDefinitionBuilderAddAttr(builder, spec.encode())
    infer = definition.infer_shape
    unknown = address_of(api.ShapeInferenceContextSetUnknownShape)
    api.OpDefinitionBuilderSetShapeInferenceFunction(builder, _compiled_shape(infer) if infer else unknown)
    api.checked(api.RegisterOpDefinition, builder)


def register_kernel(
    api: CApi, name: str, device: str, code: int, compute: Callback, function: Callable[[], int]
) -> None:
    """Registers `compute` as the kernel of an op for a kind of device and a dtype.

    `function()` is asked for each node: the state's first word.
    """

    def make_state(construction):
        try:
            return _new_state(api, construction, function(), name)
        except BaseException as error:
            api.fail_construction(construction, f"{name}: {error or type(error).__name__}")
            return None

    _makers.append(make_state)
    create = _create(len(_makers) - 1).address
    builder = api.NewKernelBuilder(name.encode(), device.encode(), create, compute.address, _delete.address)
    api.checked(api.KernelBuilder_TypeConstraint, builder, b"T", code)
    api.checked(api.RegisterKernelBuilder, f"{name}/{device}/{code}".encode(), builder)


def _new_state(api: CApi, construction: int, function: int, name: str) -> int:
    """A node's state; `_delete` frees it with the node, maybe after Python's end."""
    words = np.zeros(word.WORDS, np.int64)
    words[word.FUNCTION], words[word.OPERATION] = function, list(DEFINITIONS).index(name)
    for attribute, (first, length, least, _) in DEFINITIONS[name].attributes.items():
        part = words[first : first + length]
        if length == 1:
            api.checked(api.OpKernelConstruction_GetAttrInt64, construction, attribute.encode(), part.ctypes.data)
        else:
            read = api.OpKernelConstruction_GetAttrInt64List
            api.checked(read, construction, attribute.encode(), part.ctypes.data, length)
        if part.min() < least or part.max() > _MAX_ATTRIBUTE:
            raise checks.invalid(attribute, f"integers from {least} to 2**31-1", part.tolist())
    state = api.libc.malloc(words.nbytes)
    if not state:
        raise MemoryError(f"{words.nbytes} bytes")
    ctypes.memmove(state, words.ctypes.data, words.nbytes)
    return state
