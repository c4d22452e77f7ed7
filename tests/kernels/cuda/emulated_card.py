"""Stands for NVIDIA's driver and a card: what is launched runs, on the double's memory.

A launch is taken as the driver takes it: a kernel's handle, a grid, and addresses of the parameters, which are read by
the kernel's own signature. Kernels of the fast tier run in the `emulator`; plain ones as Python, a thread at a time.
Nothing is compiled.
"""

from __future__ import annotations

import types as python_types
import warnings
from types import SimpleNamespace

import numpy as np
from numba import types

from fastsepconv.kernels.cuda import binaries, fast_kernels, launch
from fastsepconv.kernels.cuda.memory import SimulatedPointer
from fastsepconv.kernels.cuda.tiles import Launch
from fastsepconv.kernels.geometry import Geometry
from tests.kernels.cuda import emulator
from tests.kernels.cuda.driver_double import DriverDouble, values_at

_FORMATS = {types.int32: "i", types.int64: "q", types.float32: "f", types.float64: "d"}


class EmulatedCard(DriverDouble):
    """The double, with a card behind it; `ran` names the kernels in their order."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.ran: list[str] = []
        self.handles: list[launch.Kernel] = []
        self.sources: dict[str, tuple] = {}  # of the fast kernels, by name: the factory and its arguments
        made = fast_kernels.made

        def remembered(factory, *which):
            found = made(factory, *which)
            self.sources[found.kernel.name] = factory, which
            return found

        monkeypatch.setattr(fast_kernels, "made", remembered)
        monkeypatch.setattr(binaries, "get", lambda kernel, capability: binaries.Binary(kernel.name, b""))

    def cuLibraryGetKernel(self, library, name):
        self.handles.append(launch.KERNELS[name.decode()])
        return self._done("cuLibraryGetKernel", len(self.handles) - 1)

    def cuLaunchKernel(self, kernel, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        done = super().cuLaunchKernel(kernel, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra)
        found = self.handles[kernel]
        assert shared <= max(self.allowed.get(kernel, 0), 48 * 1024), "shared memory that was not asked for"
        assert gz == by == bz == 1 and 0 < gx < 2**31 and 0 < gy < 2**16
        self.ran.append(found.name)
        values = self._arguments(found.parameters, parameters)
        if found.name in self.sources:
            self._emulate(*self.sources[found.name], Launch((gx, gy, gz), bx, shared), values)
        else:
            assert gy == 1
            _run_as_python(found.function, gx * bx, values)
        return done

    def _arguments(self, parameters, address) -> list:
        """What a kernel is given, read from where the driver reads it."""
        formats = "".join(
            "q" * len(Geometry._fields) if one == launch.GEOMETRY else _FORMATS.get(one, "Q") for one in parameters
        )
        left = values_at(address, formats)
        values = []
        for one in parameters:
            if one == launch.GEOMETRY:
                values.append(Geometry(*left[: len(one)]))
                left = left[len(one) :]
                continue
            value = left.pop(0)
            if isinstance(one, types.CPointer):
                value = self._array_at(value, np.dtype(str(one.dtype)))
            values.append(np.float32(value) if one == types.float32 else value)
        return values

    def _array_at(self, address: int, dtype: np.dtype) -> np.ndarray:
        """From an address to the end of what was allocated there; nothing at the address 0."""
        if address == 0:
            return np.empty(0, dtype)
        first = max(start for start in self.memory if start <= address)
        memory, _ = self.memory[first]
        assert address - first <= memory.size, "an address outside of what was allocated"
        return memory[address - first :].view(dtype)

    def _emulate(self, factory, which, found, values) -> None:
        watched = emulator.run(emulator.MODULES, factory, which, found, values)
        assert max(watched.written) == 1, "a result was written twice"


def _run_as_python(function, threads: int, values: list) -> None:
    place = SimpleNamespace(thread=0)
    cuda = SimpleNamespace(grid=lambda axes: place.thread, gridsize=lambda axes: threads)
    text = _as_python(function, cuda)
    arguments = [SimulatedPointer(value) if isinstance(value, np.ndarray) else value for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's scalars, which overflow as a card does
        for place.thread in range(threads):
            text(*arguments)


def _as_python(function, cuda):
    """The function, and the device functions that it calls, on another `cuda`."""
    function = getattr(function, "py_func", function)

    def exchanged(value):
        return _as_python(value, cuda) if hasattr(value, "py_func") else value

    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    names = {name: exchanged(value) for name, value in used.items()} | {
        "cuda": cuda,
        "_float_of": lambda bits: np.uint32(bits).view(np.float32),
        "_bits_of": lambda value: np.float32(value).view(np.uint32),
    }
    cells = tuple(python_types.CellType(exchanged(cell.cell_contents)) for cell in function.__closure__ or ())
    return python_types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
