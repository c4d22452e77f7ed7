"""The ops on a card: kernels of TensorFlow's device "GPU", which work on its tensors where they are.

Whether they have run on one, the README tells. The other way, DLPack in a `tf.py_function`, was not taken: TensorFlow
keeps the last inputs and outputs of each such function for a gradient that is not its own, a graph that holds one
cannot be saved, and who places it is Python. A registered kernel is an op like any other: placed by TensorFlow, on each
card of a strategy, in SavedModels, with the shapes and the gradients that the op has on the CPU.

TensorFlow keeps its streams to itself, and hands memory out while work that it has put into them may still use it. So
the kernels here run on the thread's own stream, and wait: for all work on the card once TensorFlow has given memory,
that for results and that for their own use, and for their own stream before they return. That costs at least two
rounds to the card an operation, and the work of several operations does not overlap.

Only the driver is shared with TensorFlow, whose CUDA libraries may be of another version. The kernels hold the GIL
while they launch. What of a graph TensorFlow itself puts on the CPU (`tf.data`, constants folded) is computed by the
CPU's kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numpy as np
import tensorflow as tf
from numba import types
from tensorflow.python.eager import context as eager_context

from .. import checks, dispatch
from ..kernels.cpu.jit import callback
from ..kernels.device_array import DeviceArray, Dtype, contiguous_strides
from . import array_calls
from . import tensorflow_registration as registration
from . import tensorflow_state as word
from .tensorflow_capi import (
    CANCELLED,
    INTERNAL,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    UNIMPLEMENTED,
    CApi,
    Refusal,
    address_of,
    context_failure,
    delete_status,
    new_status,
)
from .tensorflow_tensors import MAX_ELEMENTS, fail

if TYPE_CHECKING:
    from ..kernels.cuda import driver

_UINT8 = 4  # TF_UINT8
_NAMES = tuple(registration.DEFINITIONS)

_ANYWHERE = contextlib.nullcontext()

_apis: list[CApi] = []  # the one with which the kernels were registered; empty where they were not


def obstacle() -> str | None:
    """Why TensorFlow's tensors on a card cannot be computed where they are, in one sentence; None: they can."""
    missing = dispatch.obstacle("cuda")
    if missing is None and not tf.config.get_visible_devices(registration.CARD):
        missing = "TensorFlow sees no GPU"
    return missing


def register(api: CApi) -> None:
    """Registers the ops' kernels for tensors on a card, once a process; nothing where they could not run."""
    if _apis or obstacle():
        return
    _apis.append(api)
    for name in _NAMES:
        for code in registration.DTYPES:
            registration.register_kernel(api, name, registration.CARD, code, _compute, lambda: 0)


def takes(x: tf.Tensor) -> bool:
    """Whether an op on x, run or built now, runs on a card: x is there; in a graph, nothing has put it elsewhere."""
    if not _serves():
        return False
    if eager_context.executing_eagerly():
        return _kind(x.device) == registration.CARD
    return _kind(tf.constant(0).device) in (None, registration.CARD)  # where `tf.device` puts what is built now


def placement(x: tf.Tensor) -> AbstractContextManager:
    """Within it an op on x, run or built now, has its device.

    Where a backend of the CPU was set, the CPU. Else the device that x is on, which in a graph TensorFlow decides.
    """
    if not _serves():
        return _ANYWHERE
    if dispatch.get_backend() not in ("auto", "cuda"):
        return tf.device(f"/device:{registration.HOST}:0")
    return tf.device(x.device) if eager_context.executing_eagerly() else _ANYWHERE


def _serves() -> bool:
    """Whether kernels for a card are registered, and the user has left TensorFlow one."""
    return bool(_apis) and bool(tf.config.list_logical_devices(registration.CARD))


def _kind(device: str) -> str | None:
    return tf.DeviceSpec.from_string(device).device_type


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))
def _run(state: int, context: int, done: ctypes._Pointer) -> None:
    """A node's run; what goes wrong becomes a TensorFlow error."""
    api = _apis[0]
    try:
        _run_node(api, state, context)
    except BaseException as error:
        api.fail_computation(context, _code_of(error), str(error) or type(error).__name__)
    done[0] = 1


def _code_of(error: BaseException) -> int:
    if isinstance(error, Refusal):
        return error.code
    if isinstance(error, TypeError | ValueError):
        return INVALID_ARGUMENT
    return INTERNAL if isinstance(error, Exception) else CANCELLED


llvmlite.binding.add_symbol("fastsepconv_run_on_card", address_of(_run))
_run_in_python = types.ExternalFunction("fastsepconv_run_on_card", types.void(types.intp, types.intp, types.intp))


@callback(registration.CALLBACK)
def _compute(state, context):
    """What TensorFlow calls: machine code, since Ctrl-C may end a Python callback before its first line."""
    done = np.zeros(1, np.int64)
    _run_in_python(state, context, done.ctypes.data)
    if done[0] == 0:
        status = new_status()
        fail(status, CANCELLED, "interrupted while fastsepconv computed on a card", ())
        context_failure(context, status)
        delete_status(status)


def _run_node(api: CApi, state: int, context: int) -> None:
    words = (ctypes.c_int64 * word.WORDS).from_address(state)
    name = _NAMES[words[word.OPERATION]]
    definition = registration.DEFINITIONS[name]
    named: dict[str, Any] = {
        attribute: words[first] if length == 1 else tuple(words[first : first + length])
        for attribute, (first, length, *_) in definition.attributes.items()
    }
    if named.get("residuals"):
        raise Refusal(UNIMPLEMENTED, f"{name} of a model that was frozen for the CPU does not run on a card")
    kind = name.removeprefix("Fastsepconv").removesuffix("Grad")
    count = len(definition.inputs) - max(1, len(definition.lists))  # of the operands; dy, or lists, come after them
    with _Run(api, context) as run:
        operands, rest = run.inputs[:count], run.inputs[count:]
        if not name.endswith("Grad"):
            if len(rest) > 1:
                raise checks.invalid("bias", "one vector, or none", len(rest))
            array_calls.forward(run.kernels, kind, operands, rest[0] if rest else None, named, run.result)
            return
        bits = named.pop("wanted")
        wanted = [bool(bits >> i & 1) for i in range(len(definition.outputs))]
        gradients = array_calls.backward(run.kernels, kind, operands, rest[0], named, wanted, run.result)
        for i, gradient in enumerate(gradients):
            if gradient is None:
                run.result(i, (0,))


class _Run:
    """A run of a node: its inputs, and memory from TensorFlow. Within it; at its end all that was launched is done."""

    def __init__(self, api: CApi, context: int) -> None:
        from ..kernels.cuda import driver, memory

        self.kernels = dispatch.kernels("cuda")
        self._driver, self._api, self._context = driver, api, context
        self._code = api.ExpectedOutputDataType(context, 0)
        self._dtype = Dtype(np.dtype(registration.DTYPES[self._code]).name)
        inputs = [self._input(i) for i in range(api.NumInputs(context))]
        # TensorFlow's stream is not known, its card is; where all is empty there is none, and nothing to compute.
        addresses = [address for address, shape in inputs if math.prod(shape)]
        self._stream = driver.own_stream(self._card_of(addresses[0])) if addresses else None
        self.inputs = [self._array(*each) for each in inputs]
        self._temporaries: list[int] = []
        self._held = contextlib.ExitStack()
        self._room_from = memory.room_from

    def __enter__(self) -> _Run:
        if self._stream:
            self._held.enter_context(self._driver.turned_to(self._stream.device))
        self._held.callback(self._finish)
        self._held.enter_context(self._room_from(self._room))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait, give the memory back, and leave the thread with the card that it had."""
        self._held.__exit__(kind, error, trace)

    def _finish(self) -> None:
        try:
            if self._stream:
                self._driver.synchronize(self._stream, "Computing on the card")
        finally:
            for handle in self._temporaries:
                self._api.DeleteTensor(handle)

    def result(self, index: int, shape: tuple[int, ...]) -> DeviceArray:
        """Result `index`, of a shape."""
        if math.prod(shape) > MAX_ELEMENTS:
            raise Refusal(RESOURCE_EXHAUSTED, f"The result of shape {shape} is too large")
        allocate = self._api.AllocateOutput
        handle = self._api.checked(allocate, self._context, index, self._code, _sizes(shape), len(shape), 0)
        address = self._api.TensorData(handle)
        self._api.DeleteTensor(handle)  # TensorFlow holds on to the memory
        self._wait()
        return self._array(address, shape)

    def _room(self, size: int) -> int:
        """The address of so many bytes until the end of the run."""
        handle = self._api.checked(self._api.AllocateTemp, self._context, _UINT8, _sizes((size,)), 1, None)
        self._temporaries.append(handle)
        self._wait()
        return self._api.TensorData(handle)

    def _wait(self) -> None:
        """Until nothing uses the memory any more that TensorFlow has just given, and the inputs are computed."""
        if self._stream:
            self._driver.synchronize_card(self._stream, "Waiting for TensorFlow's work on the card")

    def _input(self, index: int) -> tuple[int, tuple[int, ...]]:
        """Address and shape of an input, which TensorFlow holds on to."""
        slot = ctypes.c_void_p()
        self._api.checked(self._api.GetInput, self._context, index, ctypes.byref(slot))
        handle = slot.value
        shape = tuple(self._api.Dim(handle, axis) for axis in range(self._api.NumDims(handle)))
        address = self._api.TensorData(handle) or 0
        self._api.DeleteTensor(handle)
        return address, shape

    def _array(self, address: int | None, shape: tuple[int, ...]) -> DeviceArray:
        card, handle = (self._stream.device.ordinal, self._stream.handle) if self._stream else (0, 0)
        return DeviceArray(address or 0, shape, contiguous_strides(shape), self._dtype, card, handle, True, None)

    def _card_of(self, address: int) -> driver.Device:
        if self._driver.SIMULATED:
            return self._driver.SIMULATOR
        card = self._driver.device_of(address)
        if card is None:
            raise checks.invalid("x", "tensors in the memory of a card", hex(address), " at the computer's own address")
        return self._driver.device(card)


def _sizes(shape: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(shape))(*shape)
