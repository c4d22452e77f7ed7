"""Compiled kernels kept on the disk, so that only the first process ever compiles them.

Numba's own cache watches the file of the function alone and would serve an old kernel after an edit in a file that
it imports. Here a folder stands for one state of all sources and versions, and a file in it for one compiled function:

    <root>/<hash of the sources and versions>/<function>-<hash of signature, processor, tile, closure>.jit

Whatever goes wrong with a file or folder costs a compilation, never an exception and never a wrong kernel: each file
carries a digest of its content, is put in place whole by a rename, and nothing is kept once the sources on the disk
are no longer those that this process imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import mmap
import os
import pickle
import platform
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import llvmlite
import numba
import numpy as np
from numba.core import config
from numba.core import types as numba_types
from numba.core.base import BaseContext
from numba.core.caching import _Cache
from numba.core.codegen import Codegen
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from .. import cache_folder
from .tiles import CHOSEN

FOLDER_VARIABLE = cache_folder.VARIABLE
_MAGIC = b"fastsepconv kernel 1\n"
_FOLDERS_KEPT = 16
_ABANDONED_AFTER_S = 3600
_MARK = "#"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NUMBA_OPTIONS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE")

# Told of each compilation: the function's name, and "start" or "end".
listeners: list[Callable[[str, str], None]] = []
counts = {"loaded": 0, "compiled": 0}


class DiskCache(_Cache):
    """Where one dispatcher or callback looks before it compiles, and leaves what it compiled."""

    def __init__(self, function: Callable) -> None:
        self._function = function
        self._name = f"{function.__module__}.{function.__qualname__.partition(_MARK)[0]}"
        self._sources = _source_folders(function)
        self._hash = _hash_sources(self._sources, _hash_folder)
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        folder = self._folder()
        return str(folder) if folder else None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forget what is kept for this function."""
        folder = self._folder()
        if folder:
            for file in folder.glob(f"{_file_name(self._name)}-*.jit"):
                _remove(file)

    def load_overload(self, sig: object, target_context: BaseContext) -> CompileResult | None:
        """The compiled function for `sig`, or None where it must be compiled.

        Of Numba's implementations of Python, which to import takes a third of a second, what is loaded needs only
        those that allocate memory.
        """
        rtsys.initialize(target_context)
        file = self._file(sig, target_context.codegen())
        result = _load(file, target_context) if file else None
        if result is None:
            target_context.refresh()
            _tell(self._name, "start")
        else:
            counts["loaded"] += 1
        return result

    def save_overload(self, sig: object, data: CompileResult) -> None:
        """Keep the compiled function for `sig`."""
        counts["compiled"] += 1
        file = self._file(sig, data.codegen)
        as_imported = self._hash == _hash_sources(self._sources, _hash_folder.__wrapped__)
        if file and as_imported and not data.library.has_dynamic_globals:
            _save(file, data)
        _tell(self._name, "end")

    def _folder(self) -> Path | None:
        base = root()
        return base / self._hash if base and self._hash and self._enabled else None

    def _file(self, sig: object, codegen: Codegen) -> Path | None:
        folder = self._folder()
        try:
            key = repr((_signature_key(sig), codegen.magic_tuple(), _function_key(self._function), _process_key()))
        except (TypeError, ValueError, RecursionError):  # closes over what has no name that lasts
            return None
        if folder is None or _ADDRESS.search(key):  # an address means something else in the next process
            return None
        return folder / f"{_file_name(self._name)}-{_digest(key.encode())}.jit"


def with_lasting_name(function: Callable) -> Callable:
    """Make the name of a function that another one made say what it closes over.

    Numba names machine code by the function's name and a count. Of two functions from one line, one loaded and one
    compiled here, the linker would otherwise take the one for the other.
    """
    if "<locals>" in function.__qualname__:
        try:
            mark = _digest(repr(_function_key(function)).encode())
        except (TypeError, ValueError, RecursionError):
            mark = uuid.uuid4().hex
        function.__qualname__ += _MARK + mark
    return function


def root() -> Path | None:
    """The folder of all that is kept for the CPU; None where nothing can be."""
    base = cache_folder.root()
    return base / "jit" if base else None


def state() -> dict[str, object]:
    """The state of the cache, as `doctor` tells it. `problem` is None, or why nothing can be kept."""
    base = root()
    if base is None:
        no_home = f"no home folder; set {FOLDER_VARIABLE} to a folder that can be written"
        return {"folder": None, "entries": 0, "bytes": 0, "problem": no_home, **counts}
    sizes = []
    with contextlib.suppress(OSError):
        sizes = [file.stat().st_size for file in base.glob("*/*.jit")]
    problem: str | None = None
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=base).close()
    except OSError as error:
        problem = f"cannot be written ({error.strerror}); set {FOLDER_VARIABLE} to a folder that can"
    return {"folder": str(base), "entries": len(sizes), "bytes": sum(sizes), "problem": problem, **counts}


def _load(file: Path, target_context: BaseContext) -> CompileResult | None:
    payload = cache_folder.read(file, _MAGIC)
    if payload is not None:
        with contextlib.suppress(Exception):  # what pickle and LLVM can raise is open-ended; compiling mends it
            result = CompileResult._rebuild(target_context, *pickle.loads(payload))
            _mark_used(file.parent)
            return result
    _remove(file)
    return None


def _save(file: Path, data: CompileResult) -> None:
    try:
        cache_folder.write(file, _MAGIC, dumps(data._reduce()))
        _mark_used(file.parent)
        _tidy(file.parent)
    except OSError as error:
        _warn_once(f"{file.parent.parent}: {error.strerror or error}")
    except Exception as error:  # the kernel is compiled and right, whatever kept it from being written down
        _warn_once(f"{file.name}: {type(error).__name__}: {error}")


@functools.lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"Compiled kernels cannot be kept, so each process compiles its own ({reason}). "
        f"{FOLDER_VARIABLE} names another folder.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _mark_used(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(folder)


@functools.cache
def _tidy(folder: Path) -> None:
    """Drop the folders that were left unused longest, and what a killed process left half written. Once a process."""
    now = time.time()
    with contextlib.suppress(OSError):
        for file in folder.glob("*.tmp"):
            if now - file.stat().st_mtime > _ABANDONED_AFTER_S:
                _remove(file)
        ours = [path for path in folder.parent.iterdir() if re.fullmatch(r"[0-9a-f]{32}", path.name)]
        for path in sorted(ours, key=lambda path: path.stat().st_mtime, reverse=True)[_FOLDERS_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _tell(name: str, phase: str) -> None:
    for listener in list(listeners):
        listener(name, phase)


def _source_folders(function: Callable) -> tuple[Path, ...]:
    """The folders whose sources may end in the function's machine code: the kernels' and its own."""
    here = Path(__file__).resolve().parent
    own = Path(inspect.getfile(function)).resolve().parent
    return tuple(dict.fromkeys((here.parent, here, own)))


def _hash_sources(folders: tuple[Path, ...], hash_folder: Callable[[Path], str]) -> str | None:
    """One hash for the sources and all versions; None where the sources cannot be read."""
    versions = platform.python_version(), numba.__version__, llvmlite.__version__, np.__version__
    try:
        return _digest(repr((versions, [hash_folder(folder) for folder in folders])).encode())
    except OSError:
        return None


@functools.cache
def _hash_folder(folder: Path) -> str:
    """A hash of the sources in `folder`. Remembered: what counts is what was there when the process imported them."""
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"no sources in {folder}")
    return _digest(repr([(file.name, _digest(file.read_bytes())) for file in files]).encode())


def _process_key() -> tuple:
    """What this process was started with and the machine code depends on."""
    options = tuple(getattr(config, name, None) for name in _NUMBA_OPTIONS)
    return CHOSEN.name, mmap.PAGESIZE, options


def _signature_key(sig: object) -> object:
    if isinstance(sig, tuple | list):
        return tuple(_signature_key(part) for part in sig)
    if isinstance(sig, numba_types.Dispatcher):
        return _function_key(sig.dispatcher.py_func)
    if isinstance(sig, numba_types.Function):
        return _value_key(sig.typing_key)
    return str(sig)


def _function_key(function: Callable) -> tuple:
    """Tells apart functions that one line of source makes, by the code and by what it closes over."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return function.__module__, function.__qualname__, _code_key(function.__code__), _value_key(cells)


def _code_key(code: CodeType) -> tuple:
    constants = tuple(_constant_key(constant) for constant in code.co_consts)
    return code.co_firstlineno, _digest(code.co_code), code.co_names, constants


def _constant_key(constant: object) -> object:
    if isinstance(constant, CodeType):
        return _code_key(constant)
    if isinstance(constant, frozenset):  # whose order changes from process to process
        return sorted(map(repr, constant))
    return repr(constant)


def _value_key(value: object) -> object:
    if isinstance(value, tuple | list):
        return tuple(_value_key(part) for part in value)
    if isinstance(value, Dispatcher):
        return _function_key(value.py_func)
    if isinstance(value, _Intrinsic):
        return _function_key(value._defn)
    if isinstance(value, FunctionType):
        return _function_key(value)
    if isinstance(value, type | ModuleType | BuiltinFunctionType | np.ufunc):
        return getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic | np.dtype | numba_types.Type):
        return repr(value)
    raise TypeError(f"no lasting name for {value!r}")


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "", name.removeprefix("fastsepconv.kernels."))[:80]


def _digest(content: bytes) -> str:
    return cache_folder.digest(content).hex()


# The kernels' modules are imported right after this one: what lies there now is what they are compiled from.
with contextlib.suppress(OSError):
    _hash_sources(_source_folders(DiskCache), _hash_folder)
