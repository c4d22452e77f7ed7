"""NVIDIA's driver: devices, their contexts, streams and memory. Every refusal becomes a sentence that names the cause.

Nothing here waits for the card but `synchronize` and `synchronize_card`; memory is allocated and freed in the order of
a stream, so that all of it can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..nvidia import LEAST_CAPABILITY
from .elements import SIMULATED

if not SIMULATED:
    from cuda.bindings import driver as api

PER_THREAD_STREAM = 2  # the driver's own name for the calling thread's default stream


class TooOld(RuntimeError):
    """A card's compute capability is below that of the kernels."""


class Device(NamedTuple):
    """A card, and the context that frameworks share on it."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    context: int
    shared_limit: int  # bytes of shared memory that a block may have, if it asks for them


class Stream(NamedTuple):
    """Where work is put: a stream by the driver's handle, and the card that it belongs to."""

    handle: int
    device: Device


SHARED_UNASKED = 48 * 1024  # bytes of dynamic shared memory that a block may have without asking
SIMULATOR = Device(0, "Numba's simulator", LEAST_CAPABILITY, 0, SHARED_UNASKED)


def call(doing: str, function: Callable, *arguments: Any) -> Any:
    """The result of a function of the driver's; raises RuntimeError, which says what was being done, if it fails."""
    status, *results = function(*arguments)
    if status:
        raise RuntimeError(f"{doing} failed: {_explain(status)}")
    return results[0] if len(results) == 1 else results


def clean_up(doing: str, function: Callable, *arguments: Any) -> None:
    """As `call`; but while an error is raised, the first one that the card has met, a refusal says nothing new."""
    (status,) = function(*arguments)
    if status and sys.exc_info()[0] is None:
        raise RuntimeError(f"{doing} failed: {_explain(status)}")


def _explain(status: Any) -> str:
    """The driver's name and words for a status."""
    texts = [function(status) for function in (api.cuGetErrorName, api.cuGetErrorString)]
    words = [text.decode(errors="replace") for error, text in texts if not error and text]
    return ": ".join(words) or f"error {int(status)}"


@functools.cache
def device(ordinal: int) -> Device:
    """The card of that number, its context kept from now on.

    Raises:
        TooOld: the kernels need a newer one.
        RuntimeError: there is none.
    """
    call("Starting the NVIDIA driver", api.cuInit, 0)
    count = call("Counting the cards", api.cuDeviceGetCount)
    if not 0 <= ordinal < count:
        raise RuntimeError(f"There is no card {ordinal}: the NVIDIA driver sees {count}.")
    handle = call(f"Asking for card {ordinal}", api.cuDeviceGet, ordinal)
    name = call(f"Asking card {ordinal} its name", api.cuDeviceGetName, 100, handle)
    name = name.split(b"\0")[0].decode(errors="replace")
    attributes = api.CUdevice_attribute
    parts = (
        attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    major, minor = (call(f"Asking card {ordinal} its age", api.cuDeviceGetAttribute, part, handle) for part in parts)
    if (major, minor) < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        raise TooOld(f"Card {ordinal}, {name}, has compute capability {major}.{minor}: {needed} or newer is needed.")
    limit = attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    shared = call(f"Asking card {ordinal} its shared memory", api.cuDeviceGetAttribute, limit, handle)
    context = call(f"Starting card {ordinal}", api.cuDevicePrimaryCtxRetain, handle)
    return Device(ordinal, name, (major, minor), int(context), int(shared))


def first_device() -> Device:
    """The first card that is not too old, where arrays of the computer's own go; all too old: `device`'s error."""
    if SIMULATED:
        return SIMULATOR
    ordinal = 0
    while True:
        try:
            return device(ordinal)
        except TooOld:
            ordinal += 1
            if ordinal == call("Counting the cards", api.cuDeviceGetCount):
                raise


@contextlib.contextmanager
def turned_to(device: Device) -> Iterator[None]:
    """Within it the card's context is the calling thread's; frameworks take their current card from that, so it is
    put back.
    """
    if SIMULATED:
        yield
        return
    before = call("Asking for the current context", api.cuCtxGetCurrent)
    if int(before) == device.context:
        yield
        return
    call(f"Turning to card {device.ordinal}", api.cuCtxSetCurrent, device.context)
    try:
        yield
    finally:
        clean_up("Turning back", api.cuCtxSetCurrent, before)


def own_stream(on: Device) -> Stream:
    """The calling thread's default stream on a card: it is that only where the thread is `turned_to` the card."""
    return Stream(0 if SIMULATED else PER_THREAD_STREAM, on)


def allocate(size: int, what: str, stream: Stream) -> int:
    """The address of `size` new bytes on the card, or 0 for none; `what` they are for is said if there is no room."""
    if size == 0:
        return 0
    status, address = api.cuMemAllocAsync(size, stream.handle)
    if status == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise RuntimeError(f"The memory of {_card(stream)} has no room for the {size} bytes of {what}.")
    if status:
        raise RuntimeError(f"Allocating {size} bytes for {what} on {_card(stream)} failed: {_explain(status)}")
    return int(address)


def free(address: int, stream: Stream) -> None:
    """Give memory from `allocate` back, once what was put into the stream before is done."""
    if address:
        clean_up("Freeing memory of the card", api.cuMemFreeAsync, address, stream.handle)


def copy_in(address: int, source: int, size: int, stream: Stream) -> None:
    """Copy `size` bytes from the computer's memory to the card's."""
    if size:
        call("Copying to the card", api.cuMemcpyHtoDAsync, address, source, size, stream.handle)


def copy_out(target: int, address: int, size: int, stream: Stream) -> None:
    """Copy `size` bytes from the card's memory to the computer's."""
    if size:
        call("Copying from the card", api.cuMemcpyDtoHAsync, target, address, size, stream.handle)


def synchronize(stream: Stream, doing: str) -> None:
    """Wait until all that was put into the stream is done; an error of its kernels is raised here."""
    if SIMULATED:
        return
    call(doing, api.cuStreamSynchronize, stream.handle)


def synchronize_card(stream: Stream, doing: str) -> None:
    """Wait until all that was put into any stream of the card in this process is done, whoever did."""
    if SIMULATED:
        return
    with turned_to(stream.device):
        call(doing, api.cuCtxSynchronize)


def is_capturing(stream: Stream) -> bool:
    """Whether the stream records a graph, and so must not be waited for."""
    status = call("Asking for the stream's state", api.cuStreamIsCapturing, stream.handle)
    return status != api.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


def order_after(stream: Stream, other: int) -> None:
    """What is put into `stream` from now on runs after what is in the stream with the handle `other` now."""
    if SIMULATED or other == stream.handle:
        return
    flags = int(api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
    event = call("Making an event", api.cuEventCreate, flags)
    try:
        call("Recording an event", api.cuEventRecord, event, other)
        call("Waiting for an event", api.cuStreamWaitEvent, stream.handle, event, 0)
    finally:
        clean_up("Dropping an event", api.cuEventDestroy, event)


def device_of(address: int) -> int | None:
    """The number of the card whose memory holds `address`; None where it is the computer's own memory."""
    kinds, memory = api.CUpointer_attribute, api.CUmemorytype
    status, kind = api.cuPointerGetAttribute(kinds.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
    if status or int(kind) == int(memory.CU_MEMORYTYPE_HOST):
        return None
    return int(call("Asking whose memory it is", api.cuPointerGetAttribute,
                    kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address))  # fmt: skip


def load(binary: bytes, entry: str) -> tuple[Any, int]:
    """A compiled kernel, ready for every card of its capability: what keeps it loaded, and its handle."""
    library = call("Loading a kernel", api.cuLibraryLoadData, binary, [], [], 0, [], [], 0)
    kernel = call("Looking a kernel up", api.cuLibraryGetKernel, library, entry.encode())
    return library, int(kernel)


def allow_shared_memory(kernel: int, size: int, device: Device) -> None:
    """Let a kernel ask for that much dynamic shared memory a block, more than SHARED_UNASKED."""
    attribute = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    handle = call("Asking for a card", api.cuDeviceGet, device.ordinal)
    call(f"Asking for {size} bytes of shared memory", api.cuKernelSetAttribute, attribute, size, kernel, handle)


def _card(stream: Stream) -> str:
    return f"card {stream.device.ordinal} ({stream.device.name})"
