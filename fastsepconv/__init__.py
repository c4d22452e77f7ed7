"""Fast depthwise, pointwise and separable convolution: Numba kernels, a NumPy API and Keras layers.

Everything loads on first use, so that who needs only the NumPy functions never imports Keras or TensorFlow.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from . import models
    from .convert import convert, revert
    from .dispatch import get_backend, set_backend
    from .freeze import freeze
    from .kernels.cpu.threads import set_num_threads
    from .layers import FastDepthwiseConv2D, FastSeparableConv2D
    from .ops import (
        depthwise_conv2d,
        depthwise_conv2d_grad,
        pointwise_conv2d,
        pointwise_conv2d_grad,
        separable_conv2d,
        separable_conv2d_grad,
    )
    from .verify import verify

__all__ = [
    "FastDepthwiseConv2D",
    "FastSeparableConv2D",
    "convert",
    "depthwise_conv2d",
    "depthwise_conv2d_grad",
    "freeze",
    "get_backend",
    "models",
    "pointwise_conv2d",
    "pointwise_conv2d_grad",
    "revert",
    "separable_conv2d",
    "separable_conv2d_grad",
    "set_backend",
    "set_num_threads",
    "verify",
]

_MODULES = {
    "convert": ("convert", "revert"),
    "dispatch": ("get_backend", "set_backend"),
    "freeze": ("freeze",),
    "kernels.cpu.threads": ("set_num_threads",),
    "layers": ("FastDepthwiseConv2D", "FastSeparableConv2D"),
    "ops": tuple(name for name in __all__ if "_conv2d" in name),
    "verify": ("verify",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    if name == "__version__":
        return version(__name__)
    if name == "models":
        return _load("models", name)
    if name in _HOME:
        value = globals()[name] = getattr(_load(_HOME[name], name), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load(module: str, name: str) -> ModuleType:
    try:
        return import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        extra = "tensorflow" if error.name == "keras" else error.name
        framework = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}.get(extra or "")
        if framework is None:
            raise
        needs = f"`fastsepconv.{name}` needs Keras and {framework}: pip install 'fastsepconv[{extra}]'"
        raise ModuleNotFoundError(needs, name=error.name) from error


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Importing a submodule binds its name here; where a public function has that name, the function stays."""
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
