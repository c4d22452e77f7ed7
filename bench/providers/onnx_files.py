"""Where the reference leaves ONNX models and how their outputs are read; for the two runtimes that take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import Unsupported


def paths(folder: Path) -> list[Path]:
    """The problem's models, one a weight set."""
    found = sorted((folder / "onnx").glob("*.onnx"), key=lambda path: int(path.stem))
    if not found:
        raise Unsupported("no ONNX model was written: it needs the onnx package beside fastsepconv")
    return found


def read(y: np.ndarray) -> dict[str, np.ndarray]:
    """An image output comes as `[N,F,P,Q]`, a network's as `[N,classes]`."""
    return {"y": y.transpose(0, 2, 3, 1) if y.ndim == 4 else y}
