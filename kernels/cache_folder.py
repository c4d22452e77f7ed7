"""Where compiled kernels are kept on the disk, each backend's in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

VARIABLE = "FASTSEPCONV_CACHE_DIR"


def root() -> Path | None:
    """The folder named by FASTSEPCONV_CACHE_DIR, or the platform's place for caches; None for a user without a home.

    Whoever can write there can run code in this process, as with any cache of machine code.
    """
    with contextlib.suppress(RuntimeError):  # a user without a home
        if os.environ.get(VARIABLE):
            base = Path(os.environ[VARIABLE]).expanduser()
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastsepconv"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches" / "fastsepconv"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsepconv"
        return base.absolute()
    return None
