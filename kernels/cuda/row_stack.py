"""Lets numba-cuda compile beside a NumPy that has no `np.row_stack` any more.

NumPy 2.5 removed that name, and numba-cuda (0.30.4, the newest one when this was written) asks for it when it loads
what it knows of arrays, at its first compilation: no kernel compiles then. So that is loaded here, with something in
the name's place meanwhile, which nobody else gets to see.

Delete this module once every numba-cuda that pyproject.toml admits asks `hasattr(np, "row_stack")` first, as Numba's
own arrayobj.py does.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
from numba import config


def load_arrays() -> None:
    """Load numba-cuda's knowledge of arrays, once a process; nothing where NumPy has the name still."""
    # Sought in the dictionary: NumPy's __getattr__ would warn of a name that is about to go.
    if config.ENABLE_CUDASIM or "row_stack" in vars(np):
        return
    vars(np)["row_stack"] = _row_stack
    try:
        import_module("numba.cuda.np.arrayobj")
    finally:
        del vars(np)["row_stack"]


def _row_stack(arrays):
    """What NumPy's name meant. A function of its own, since numba-cuda tells functions apart by what they are."""
    return np.vstack(arrays)


load_arrays()
