"""How kernels are compiled: nopython, without the GIL, IEEE arithmetic (a NaN must survive), kept on the disk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numba
from numba.core import sigutils, types
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.registry import CPUDispatcher

from . import disk_cache

_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


def kernel(function: Callable) -> Dispatcher:
    """Compile a serial kernel for compiled callers. What Python would call it by is left out: a seventh of the time."""
    dispatcher = _compile(function, no_cpython_wrapper=True)
    if isinstance(dispatcher, CPUDispatcher):
        dispatcher.__class__ = _Inner
    return dispatcher


def entry(function: Callable) -> Dispatcher:
    """Compile a serial kernel that Python calls as well. Its first argument's type tells those of all others."""
    dispatcher = _compile(function)
    if isinstance(dispatcher, CPUDispatcher):
        dispatcher.__class__ = _Entry
        dispatcher.entry_points = {}
    return dispatcher


class _Inner(CPUDispatcher):
    """A kernel without what Python would call it by. A call from Python, as in tests, goes through a caller with it."""

    def __call__(self, *arguments: object) -> object:
        return _caller(self)(*arguments)


class _Entry(CPUDispatcher):
    """A kernel that asks for its arguments' types once. Numba does at each call: 7 to 14 of some 80 us (Zen 3).

    A dtype is its own type here.
    """

    entry_points: dict[type, Callable]

    def __call__(self, first: object, *others: object) -> object:
        kind = first if isinstance(first, type) else type(first)
        function = self.entry_points.get(kind)
        if function is None:
            function = self.entry_points[kind] = self.compile(tuple(map(self.typeof_pyval, (first, *others))))
        return function(first, *others)


@functools.cache
def _caller(inner: _Inner) -> Dispatcher:
    return numba.njit(**_OPTIONS)(lambda *arguments: inner(*arguments))


def _compile(function: Callable, **options: bool) -> Dispatcher:
    dispatcher = numba.njit(**_OPTIONS, **options)(disk_cache.with_lasting_name(function))
    if isinstance(dispatcher, Dispatcher):  # with NUMBA_DISABLE_JIT it is the plain function
        dispatcher._cache = disk_cache.DiskCache(function)
        _without_literals(dispatcher)
    return dispatcher


def callback(signature: object) -> Callable[[Callable], Callback]:
    """Compile a C callback of the given Numba signature; its `address` is what C code calls."""
    normalized = sigutils.normalize_signature(signature)

    def decorate(function: Callable) -> Callback:
        return Callback(function, normalized, locals={}, options={"error_model": "numpy"})

    return decorate


class Callback(CFunc):
    """A C callback that is compiled, or loaded from the disk, when its address is first asked for."""

    def __init__(self, function: Callable, signature: tuple, **options: dict) -> None:
        super().__init__(disk_cache.with_lasting_name(function), signature, **options)
        self._cache = disk_cache.DiskCache(function)

    @property
    def address(self) -> int:
        """The address of the compiled function."""
        with global_compiler_lock:
            if self._wrapper_address is None:
                self.compile()
        return self._wrapper_address


@contextlib.contextmanager
def on_compile(listener: Callable[[str, str], None]) -> Iterator[None]:
    """While the context lasts, call `listener(name, phase)`, phase "start" or "end", for each kernel that is compiled.

    A kernel that another one calls is compiled within it. Nothing is told of a kernel that comes from the disk. The
    call comes from the thread that compiles, with Numba's compiler lock held.
    """
    disk_cache.listeners.append(listener)
    try:
        yield
    finally:
        disk_cache.listeners.remove(listener)


def state() -> dict[str, object]:
    """The disk cache: its folder, entries, bytes, problem, and how many kernels this process loaded and compiled."""
    return disk_cache.state()


def _without_literals(dispatcher: Dispatcher) -> Dispatcher:
    """Let `f(0)` and `f(n)` share one compiled function: Numba would compile compiled callers a special one for 0."""
    if isinstance(dispatcher, Dispatcher):
        find = dispatcher.get_call_template
        dispatcher.get_call_template = lambda args, kws: find(
            tuple(map(types.unliteral, args)), {name: types.unliteral(kw) for name, kw in kws.items()}
        )
    return dispatcher
