"""Compiled kernels, and where they are kept: machine code for one capability, found by what it was made from.

A kernel goes from Python to PTX through numba-cuda and from PTX to machine code through NVIDIA's linker. No card is
needed for that, but in one place: numba-cuda asks for the current one where a kernel of the fast tier calls a device
function. The tests, without a card, put something in its place.

The folder on the disk stands for one state of the sources and of the versions of all that compiles them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from numba import cuda, types
from numba.cuda.cuda_paths import get_cuda_paths

from .. import cache_folder

if TYPE_CHECKING:
    from .launch import Kernel

_MAGIC = b"fastsepconv cuda kernel 1\n"
_FOLDERS_KEPT = 8
_PACKAGES = (
    "numba", "numba-cuda", "llvmlite", "numpy", "cuda-bindings",
    "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12",
)  # fmt: skip

counts = {"loaded": 0, "compiled": 0}


class Binary(NamedTuple):
    """Code that the driver loads, and the name under which it finds the kernel there."""

    entry: str
    code: bytes


def get(kernel: Kernel, capability: tuple[int, int]) -> Binary:
    """The kernel's machine code for cards of this capability, from the disk or compiled now."""
    file = _file(kernel, capability)
    kept = _read(file) if file else None
    if kept is not None:
        counts["loaded"] += 1
        return kept
    counts["compiled"] += 1
    made = assembled(ptx(kernel, capability), target(kernel, capability))
    if file:
        _write(file, made)
    return made


def ptx(kernel: Kernel, capability: tuple[int, int]) -> str:
    """The kernel as PTX for this capability, of older instructions if it keeps to those."""
    signature = types.void(*kernel.parameters)
    bounds = {} if kernel.launch_bounds is None else {"launch_bounds": kernel.launch_bounds}
    text, _ = cuda.compile(
        kernel.function, signature, device=False, abi="numba", cc=kernel.instructions or capability, **bounds
    )
    return text


def target(kernel: Kernel, capability: tuple[int, int]) -> str:
    """What the kernel's PTX is assembled for: the card, by the name of its own instructions where it uses them."""
    own = kernel.instructions if kernel.instructions and len(kernel.instructions) == 3 else capability
    return "sm_" + "".join(map(str, own))


def entry_of(text: str) -> str:
    """The name of the one kernel in a PTX text."""
    (name,) = re.findall(r"\.visible\s+\.entry\s+([\w$]+)", text)
    return name


def assembled(text: str, target: str) -> Binary:
    """PTX as machine code; as it is, for the driver to assemble, where NVIDIA's linker is not installed."""
    entry = entry_of(text)
    if _linker_version() is None:
        return Binary(entry, text.encode() + b"\0")
    from cuda.bindings import nvjitlink

    link = nvjitlink.create(1, [f"-arch={target}"])
    try:
        code = text.encode()
        nvjitlink.add_data(link, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(link)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(link))
        nvjitlink.get_linked_cubin(link, cubin)
    finally:
        nvjitlink.destroy(link)
    return Binary(entry, bytes(cubin))


def folder() -> Path | None:
    """Where what the present sources compile to is kept; None where nothing can be."""
    root, state = cache_folder.root(), _state()
    return root / "cuda" / state if root and state else None


@functools.cache
def _state() -> str | None:
    """A hash of the kernels' sources and of the versions of what compiles them."""
    here = Path(__file__).resolve().parent
    try:
        sources = [(str(file.name), file.read_bytes()) for place in (here.parent, here) for file in _sources(place)]
    except OSError:
        return None
    versions = []
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append((package, importlib.metadata.version(package)))
    try:
        toolkit = _toolkit()
    except Exception:  # of many kinds, where there is none: nothing will be compiled either
        return None
    return _digest(repr((platform.python_version(), versions, toolkit, sources)).encode())


def _toolkit() -> list:
    """What tells one toolkit from another, also where it comes from no package: its compiler's parts, and its linker.

    A part is a file's name and size.
    """
    paths = get_cuda_paths()
    files = [Path(paths[part].info) for part in ("nvvm", "libdevice")]
    return [*((file.name, file.stat().st_size) for file in files), _linker_version()]


def _linker_version() -> tuple[int, ...] | None:
    """That of NVIDIA's linker; None where it is not installed."""
    try:
        from cuda.bindings import nvjitlink

        return nvjitlink.version()
    except (ImportError, RuntimeError):
        return None


def _sources(place: Path) -> list[Path]:
    return sorted(place.glob("*.py"))


def _file(kernel: Kernel, capability: tuple[int, int]) -> Path | None:
    base = folder()
    if base is None:
        return None
    name = re.sub(r"[^A-Za-z0-9_]+", "-", kernel.name).strip("-")
    made_from = kernel.name, list(map(str, kernel.parameters)), kernel.launch_bounds, kernel.instructions
    key = _digest(repr(made_from).encode())
    return base / f"{name}-sm{capability[0]}{capability[1]}-{key[:8]}.kernel"


def _read(file: Path) -> Binary | None:
    """What is kept in a file; None where there is none, or where it is not what was written."""
    payload = cache_folder.read(file, _MAGIC)
    if payload is None:
        return None
    head, _, code = payload.partition(b"\n")
    return Binary(json.loads(head)["entry"], code)


def _write(file: Path, binary: Binary) -> None:
    """Keep a binary. Where that fails, the next process compiles again."""
    with contextlib.suppress(OSError):
        cache_folder.write(file, _MAGIC, json.dumps({"entry": binary.entry}).encode() + b"\n" + binary.code)
        _drop_old_folders(file.parent)


@functools.cache
def _drop_old_folders(current: Path) -> None:
    """Drop the folders that were left unused longest. Once a process."""
    with contextlib.suppress(OSError):
        os.utime(current)
        folders = sorted(current.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in folders[_FOLDERS_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def _digest(content: bytes) -> str:
    return cache_folder.digest(content).hex()
