"""From frameworks' tensors to the kernels and back. Each module imports its framework; this one imports none."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = {"tensorflow": "tensorflow", "torch": "torch"}
_AUTODIFF = {"tensorflow": "tensorflow_autodiff", "torch": "torch_autodiff"}


def for_backend(name: str) -> ModuleType | None:
    """The module that serves Keras's backend `name`, or None where there is none."""
    return _load(_MODULES.get(name))


def autodiff(name: str) -> ModuleType | None:
    """The module that differentiates models on Keras's backend `name`, or None where there is none."""
    return _load(_AUTODIFF.get(name))


def _load(module: str | None) -> ModuleType | None:
    return None if module is None else importlib.import_module(f"{__name__}.{module}")
