"""Model files: written whole or not at all, with what a run needs to go on; read with an error that names the file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

import fastsepconv.layers  # noqa: F401  (makes its classes known to load_model)
from fastsepconv.cli.console import CommandError

MEMBER = "training.json"  # beside Keras's own members of the .keras archive; Keras passes over it


def save(model: keras.Model, path: Path, training: Mapping[str, Any] | None = None) -> None:
    """Write `model`, its optimizer and `training` to one .keras file; until it is whole, `path` stays as it was."""
    partial = path.with_name(f".{path.stem}.partial.keras")
    try:
        model.save(partial)
        if training is not None:
            with zipfile.ZipFile(partial, "a") as archive:
                archive.writestr(MEMBER, json.dumps(training))
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> keras.Model:
    """The model of a .keras file; raises CommandError, which names the file, where it is missing or broken."""
    return _read(path, lambda: keras.models.load_model(path))


def training(path: Path) -> dict[str, Any]:
    """What `save` was given as `training`; empty for files of other programs."""

    def member() -> dict[str, Any]:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(MEMBER)) if MEMBER in archive.namelist() else {}

    return _read(path, member)


def _read(path: Path, read: Callable[[], Any]) -> Any:
    expected = "a .keras file, as `fastsepconv train` or Keras's model.save() writes it"
    if not path.is_file():
        raise CommandError(f"{path}: no such file. Expected {expected}")
    try:
        return read()
    except Exception as error:  # whatever Keras, h5py and zipfile raise on a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(f"{path}: {reason}. Expected {expected}") from error
