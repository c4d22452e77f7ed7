"""From frameworks' tensors to the kernels and back. Each module imports its framework; this one imports none."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = {"tensorflow": "tensorflow", "torch": "torch"}


def for_backend(name: str) -> ModuleType | None:
    """The module that serves Keras's backend `name`, or None where there is none."""
    module = _MODULES.get(name)
    return None if module is None else importlib.import_module(f"{__name__}.{module}")
