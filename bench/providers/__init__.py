"""Who can be raced. A provider is a module here with a class `Provider(threads, **options)` that has

    versions                         {library: version}
    prepare(problem, folder)         -> (steps, read): callables, one a weight set, each a whole call that returns
                                        an output of its own; and a function from what a step returns to
                                        {name: array} in this project's layouts. Raises Unsupported.

Importing the module imports its library; ImportError means that the provider is absent.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Unsupported(Exception):
    """The provider has no such problem; the message says why."""


@dataclass(frozen=True)
class Entry:
    module: str
    library: str
    title: str
    options: dict = field(default_factory=dict)
    apart: bool = False  # shown with the others, but no part of their ratios
    inference_only: bool = False
    ops: tuple[str, ...] = ("separable", "depthwise", "pointwise", "network")
    dtypes: tuple[str, ...] = ("float32",)


_BOTH, _LAYERS = ("float32", "bfloat16"), ("separable", "depthwise", "pointwise")
PROVIDERS = {
    "fastsepconv": Entry("tensorflow", "fastsepconv", "fastsepconv, op in tf.function", {"ours": True}, dtypes=_BOTH),
    "tensorflow": Entry("tensorflow", "tensorflow", "TensorFlow graph", {"ours": False}, dtypes=_BOTH),
    "fastsepconv-float32": Entry(
        "tensorflow", "fastsepconv", "fastsepconv in float32", {"ours": True, "dtype": "float32"}, dtypes=("bfloat16",)
    ),
    "torch": Entry("torch", "torch", "PyTorch, channels_last", ops=_LAYERS, dtypes=_BOTH),
    "onnxruntime": Entry("onnxruntime", "onnxruntime", "ONNX Runtime", inference_only=True),
    "openvino": Entry("openvino", "openvino", "OpenVINO", inference_only=True),
    "tensorflow-frozen": Entry(
        "frozen", "tensorflow", "TensorFlow frozen graph", {"ours": False}, inference_only=True, ops=("network",)
    ),
    "fastsepconv-frozen": Entry(
        "frozen", "fastsepconv", "fastsepconv.freeze", {"ours": True}, apart=True, inference_only=True, ops=("network",)
    ),
    "fastsepconv-arrays": Entry("arrays", "fastsepconv", "fastsepconv, NumPy arrays", apart=True, ops=_LAYERS),
    "reference": Entry("reference", "fastsepconv", "float64 reference", apart=True, dtypes=_BOTH),
}
RACERS = [name for name in PROVIDERS if name != "reference"]


def takes(provider: str, problem) -> bool:
    """Whether a provider has such problems at all."""
    entry = PROVIDERS[provider]
    fits = problem.op in entry.ops and problem.dtype in entry.dtypes
    return fits and not (entry.inference_only and problem.mode in ("backward", "train"))
