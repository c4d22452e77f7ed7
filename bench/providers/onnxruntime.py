"""ONNX Runtime: the problem's ONNX model, in its native NCHW. Weights are constants there, packed when it loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from .. import data
from ..problems import Problem
from . import onnx_files


class Provider:
    def __init__(self, threads: int):
        self.options = onnxruntime.SessionOptions()
        # one pool for all sessions: with a pool each, the rotated weight sets' threads would spin against one another
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        self.options.use_per_session_threads = False
        self.versions = {"onnxruntime": onnxruntime.__version__}

    def prepare(self, problem: Problem, folder: Path):
        x = np.ascontiguousarray(data.load_input(folder)["x"].transpose(0, 3, 1, 2))
        steps = [self._step(path, x) for path in onnx_files.paths(folder)]
        return steps, onnx_files.read

    def _step(self, path: Path, x: np.ndarray):
        session = onnxruntime.InferenceSession(str(path), self.options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})[0]
