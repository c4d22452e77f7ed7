"""Stands for NVIDIA's driver: memory of the computer's own, and a record of what was asked for. Kernels do not run."""

from __future__ import annotations

import ctypes

import numpy as np
from cuda.bindings import driver as real

OK = real.CUresult.CUDA_SUCCESS
CONTEXT = 77
ALIGNMENT = 256  # of what the driver allocates
_TYPES = {"q": ctypes.c_int64, "Q": ctypes.c_uint64, "d": ctypes.c_double, "i": ctypes.c_int32, "f": ctypes.c_float}


class DriverDouble:
    """`cuda.bindings.driver` as far as the backend asks for it."""

    CUresult = real.CUresult
    CUdevice_attribute = real.CUdevice_attribute
    CUstreamCaptureStatus = real.CUstreamCaptureStatus
    CUevent_flags = real.CUevent_flags
    CUpointer_attribute = real.CUpointer_attribute
    CUmemorytype = real.CUmemorytype
    CUfunction_attribute = real.CUfunction_attribute

    def __init__(self, capability=(9, 0), cards=1):
        self.capability, self.cards = capability, cards
        self.capabilities = {}  # of cards that have another one, by their numbers
        self.shared_limit = 227 * 1024
        self.allowed = {}  # dynamic shared memory that kernels may ask for, by their handles
        self.fails = {}  # status by the function's name, or by ("cuMemAllocAsync", the number of the call)
        self.calls = []
        self.memory = {}
        self.launches = []
        self.current = 0
        self.capturing = False
        self.card_of_others = None  # where memory lies that is not from here; None: it is the computer's
        self.formats = {}  # of the parameters, by kernel name; filled by the test

    def _done(self, name, *results):
        self.calls.append(name)
        count = self.calls.count(name)
        return (self.fails.get(name, self.fails.get((name, count), OK)), *results)

    def named(self, *names):
        """The calls of these names, in order."""
        return [call for call in self.calls if call in names]

    def cuInit(self, flags):
        return self._done("cuInit")

    def cuDeviceGetCount(self):
        return self._done("cuDeviceGetCount", self.cards)

    def cuDeviceGet(self, ordinal):
        return self._done("cuDeviceGet", ordinal)

    def cuDeviceGetName(self, length, device):
        return self._done("cuDeviceGetName", b"A double" + b"\0" * 8)

    def cuDeviceGetAttribute(self, attribute, device):
        kinds, (major, minor) = self.CUdevice_attribute, self.capabilities.get(device, self.capability)
        found = {
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: major,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: minor,
            kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: self.shared_limit,
        }
        return self._done("cuDeviceGetAttribute", found[attribute])

    def cuDevicePrimaryCtxRetain(self, device):
        return self._done("cuDevicePrimaryCtxRetain", CONTEXT + device)

    def cuCtxGetCurrent(self):
        return self._done("cuCtxGetCurrent", self.current)

    def cuCtxSynchronize(self):
        return self._done("cuCtxSynchronize")

    def cuCtxSetCurrent(self, context):
        self.current = context
        return self._done("cuCtxSetCurrent")

    def cuLibraryLoadData(self, code, *options):
        self.code = code
        return self._done("cuLibraryLoadData", object())

    def cuLibraryGetKernel(self, library, name):
        self.entry = name
        return self._done("cuLibraryGetKernel", len(self.calls))

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.allowed[kernel] = value
        return self._done("cuKernelSetAttribute")

    def cuMemAllocAsync(self, size, stream):
        done = self._done("cuMemAllocAsync")
        if done[0]:
            return (*done, 0)
        memory = np.zeros(size + ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % ALIGNMENT
        memory = memory[first : first + size]
        self.memory[memory.ctypes.data] = memory, stream
        return (*done, memory.ctypes.data)

    def cuMemFreeAsync(self, address, stream):
        _, own_stream = self.memory.pop(address)
        assert stream == own_stream
        return self._done("cuMemFreeAsync")

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)
        return self._done("cuMemcpyHtoDAsync")

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)
        return self._done("cuMemcpyDtoHAsync")

    def cuStreamSynchronize(self, stream):
        return self._done("cuStreamSynchronize")

    def cuStreamIsCapturing(self, stream):
        states = self.CUstreamCaptureStatus
        active, none = states.CU_STREAM_CAPTURE_STATUS_ACTIVE, states.CU_STREAM_CAPTURE_STATUS_NONE
        return self._done("cuStreamIsCapturing", active if self.capturing else none)

    def cuEventCreate(self, flags):
        return self._done("cuEventCreate", "event")

    def cuEventRecord(self, event, stream):
        self.recorded = stream
        return self._done("cuEventRecord")

    def cuStreamWaitEvent(self, stream, event, flags):
        self.waiting = stream
        return self._done("cuStreamWaitEvent")

    def cuEventDestroy(self, event):
        return self._done("cuEventDestroy")

    def cuPointerGetAttribute(self, attribute, address):
        if attribute == self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            kinds = self.CUmemorytype
            on_card = address in self.memory or self.card_of_others is not None
            return self._done("cuPointerGetAttribute", int(kinds.CU_MEMORYTYPE_DEVICE if on_card else 1))
        return self._done("cuPointerGetAttribute", 0 if address in self.memory else self.card_of_others)

    def cuGetErrorName(self, status):
        return OK, status.name.encode()

    def cuGetErrorString(self, status):
        return OK, b"in the driver's words"

    def cuLaunchKernel(self, kernel, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        self.launches.append({"grid": (gx, gy, gz), "block": (bx, by, bz), "shared": shared, "stream": stream})
        self.launched_in = self.current
        self.parameters = parameters
        return self._done("cuLaunchKernel")


def values_at(address: int, formats: str) -> list:
    """The values of a launch's parameters, read as the driver reads them."""
    places = (ctypes.c_void_p * len(formats)).from_address(address)
    return [_TYPES[one].from_address(place).value for one, place in zip(formats, places, strict=True)]
