"""OpenVINO: the problem's ONNX model in float32. Weights are constants there, packed when it loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino

from .. import data
from ..problems import Problem
from . import onnx_files


class Provider:
    def __init__(self, threads: int):
        self.core = openvino.Core()
        self.settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.versions = {"openvino": openvino.__version__.split("-")[0]}

    def prepare(self, problem: Problem, folder: Path):
        x = np.ascontiguousarray(data.load_input(folder)["x"].transpose(0, 3, 1, 2))
        steps = [self._step(path, x) for path in onnx_files.paths(folder)]
        return steps, onnx_files.read

    def _step(self, path: Path, x: np.ndarray):
        request = self.core.compile_model(str(path), "CPU", self.settings).create_infer_request()
        # shared: OpenVINO's own memory is handed out, no copy is added to its time
        return lambda: request.infer({"x": x}, share_inputs=True, share_outputs=True)[0]
