"""Where compiled kernels are kept on the disk, each backend's in a folder of its own, and how a file is kept whole.

A file begins with a word that says what it is, then a digest of the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

VARIABLE = "FASTSEPCONV_CACHE_DIR"
_DIGEST_SIZE = 16


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


def digest(content: bytes) -> bytes:
    """What tells one content from another."""
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).digest()


def read(file: Path, word: bytes) -> bytes | None:
    """What `write` put there; None where there is no such file, or it is not whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    sealed, payload = content[len(word) : len(word) + _DIGEST_SIZE], content[len(word) + _DIGEST_SIZE :]
    return payload if content.startswith(word) and sealed == digest(payload) else None


def write(file: Path, word: bytes, payload: bytes) -> None:
    """Put the content in the file's place, at once and whole; raises OSError where that cannot be."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as stream:
        try:
            stream.write(word + digest(payload) + payload)
            stream.close()
            os.replace(stream.name, file)
        except BaseException:
            stream.close()
            with contextlib.suppress(OSError):
                os.unlink(stream.name)
            raise
