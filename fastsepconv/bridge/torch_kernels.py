"""PyTorch tensors to the kernels' addresses: what an operator does when it runs.

Checks, memory and dtypes are the same on every device; `_kernels_on` says who computes on which. On the CPU it is the
backend of `set_backend`; one that is not the CPU's own is handed arrays that share the tensors' memory. On a card it is
the CUDA backend, on PyTorch's current stream. Memory for the results, and on a card for what lies between, comes from
PyTorch's own allocator; inputs are copied only where they are not contiguous, or of a half type that the kernels of
the CPU do not take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import checks, dispatch
from ..kernels import cpu
from ..kernels.cpu import depthwise, pointwise, separable, threads
from ..kernels.cpu.huge_pages import ask_for_huge_pages
from ..kernels.cpu.simd import BFLOAT16
from . import torch_cuda
from .static_shapes import output_shape

OPERANDS = {
    "separable": ("x", "depthwise_kernel", "pointwise_kernel"),
    "depthwise": ("x", "depthwise_kernel"),
    "pointwise": ("x", "pointwise_kernel"),
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MODULES = {"separable": separable, "depthwise": depthwise, "pointwise": pointwise}
_SCALARS = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: BFLOAT16}

_ATTRIBUTES = ("strides", "dilations", "same", "padding")

Tensors = Mapping[str, Any]  # by the names of the arguments; the bias may be None
Shape = tuple[int, ...]
Window = tuple  # the values of `static_shapes.window`, lists as tuples; empty for a pointwise convolution


class Device(NamedTuple):
    """What computes on a kind of device.

    working: for either way, "forward" or "backward", and a dtype that its kernels do not take, the one that they
        compute it in.
    run: `run(kind, way, sizes, tensors)` runs the kernel of an operation, way "forward" or "backward", on contiguous
        tensors of one working dtype, as the kernel takes them: inputs, then results; None for what is absent.
    """

    working: Mapping[str, Mapping[torch.dtype, torch.dtype]]
    run: Callable[[str, str, tuple, Sequence[Any]], None]


def result_shape(kind: str, tensors: Tensors, window: Window) -> Shape:
    """`[N,P,Q,F]` for an operation's tensors by name: its operands, and the bias (or None) or dy.

    Works on sizes that are symbols too. Raises ValueError or TypeError where a tensor does not fit the others.
    """
    _check(tensors)
    shape, _ = _plan(kind, *_shapes(tensors), window)
    _check_dy(tensors, shape)
    return shape


def forward(kind: str, operands: Sequence[torch.Tensor], bias: torch.Tensor | None, window: Window) -> torch.Tensor:
    """The output `[N,P,Q,F]` for channels-last operands of one dtype, contiguous, of that dtype."""
    tensors = {**dict(zip(OPERANDS[kind], operands, strict=True)), "bias": bias}
    _check(tensors)
    shape, sizes = _known_plan(kind, *_shapes(tensors), window)
    x = operands[0]
    device = _kernels_on(x.device)
    working = device.working["forward"].get(x.dtype, x.dtype)
    y = _new(x, shape, working)
    inputs = [None if tensor is None else tensor.to(working).contiguous() for tensor in tensors.values()]
    device.run(kind, "forward", sizes, [*inputs, y])
    return _in_dtype(y, x.dtype)


def backward(
    kind: str, operands: Sequence[torch.Tensor], dy: torch.Tensor, window: Window, wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The gradients of the operands and of the bias for the output's gradient dy; empty where not wanted."""
    tensors = {**dict(zip(OPERANDS[kind], operands, strict=True)), "dy": dy}
    _check(tensors)
    shape, sizes = _known_plan(kind, *_shapes(tensors), window)
    _check_dy(tensors, shape)
    x = operands[0]
    device = _kernels_on(x.device)
    working = device.working["backward"].get(x.dtype, x.dtype)
    gradients = [_new(x, shape, working) for shape in gradient_shapes(operands, dy, wanted)]
    inputs = [tensor.to(working).contiguous() for tensor in tensors.values()]
    targets = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    device.run(kind, "backward", sizes, [*inputs, *targets])
    return [_in_dtype(gradient, x.dtype) for gradient in gradients]


def _new(x: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on x's device with anything in it."""
    tensor = x.new_empty(shape, dtype=dtype)
    if x.device.type == "cpu":
        ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _in_dtype(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return result if result.dtype is dtype else _new(result, tuple(result.shape), dtype).copy_(result)


def gradient_shapes(operands: Sequence[torch.Tensor], dy: torch.Tensor, wanted: Sequence[bool]) -> list[Shape]:
    """The shapes of what `backward` returns."""
    shapes = [*(tuple(operand.shape) for operand in operands), tuple(dy.shape[-1:])]
    if len(wanted) != len(shapes):
        raise checks.invalid("wanted", f"{len(shapes)} truth values", list(wanted))
    return [shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True)]


def _check(tensors: Tensors) -> None:
    """Hold all to x's device and dtype: raw addresses tell neither."""
    x = tensors["x"]
    if x.dtype not in _DTYPES:
        raise checks.invalid("x", "dtype " + ", ".join(checks.FLOAT_NAMES), x.dtype, ".dtype", TypeError)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise checks.invalid(name, "a dense tensor", tensor.layout, ".layout", TypeError)
        if tensor.dtype is not x.dtype:
            raise checks.invalid(name, f"x's dtype, {x.dtype}", tensor.dtype, ".dtype", TypeError)
        if tensor.device != x.device:
            raise checks.invalid(name, f"a tensor on x's device, {x.device}", str(tensor.device), ".device")


def _check_dy(tensors: Tensors, shape: Shape) -> None:
    if "dy" in tensors:
        checks.shape("dy", tensors["dy"], shape, "the output's shape")


def _shapes(tensors: Tensors) -> tuple[tuple[Shape, ...], Shape | None]:
    """The operands' shapes, and the bias's, or None."""
    bias = tensors.get("bias")
    operands = (tensor for name, tensor in tensors.items() if name not in ("bias", "dy"))
    return tuple(tuple(tensor.shape) for tensor in operands), None if bias is None else tuple(bias.shape)


def _plan(kind: str, shapes: tuple[Shape, ...], bias: Shape | None, window: Window) -> tuple[Any, tuple]:
    """The output's shape, and what the operation's kernels take before the addresses."""
    attributes = dict(zip(_ATTRIBUTES, window, strict=False))
    shape = output_shape(shapes, bias, attributes)
    if kind == "pointwise":
        return shape, (prod(shape[:-1]), shapes[0][-1], shape[-1])
    top, bottom, left, right = attributes["padding"]
    padding = "same" if attributes["same"] else ((top, bottom), (left, right))
    # Also holds the kernel to the image, and its span to what the kernels can count.
    g = checks.geometry(shapes[0], shapes[1], attributes["strides"], padding, attributes["dilations"])
    return shape, (g,) if kind == "depthwise" else (g, shape[-1])


_known_plan = lru_cache(maxsize=1024)(_plan)  # a small layer runs for no longer than the checks take


def _on_cpu(kind: str, way: str, sizes: tuple, tensors: Sequence[Any]) -> None:
    scalar = _SCALARS[tensors[0].dtype]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    bound = np.float32 if scalar is BFLOAT16 else scalar
    low, high = bound(-np.inf), bound(np.inf)
    bounds = () if way == "backward" else (low, high) if kind == "pointwise" else (low, low, high)  # x's, then y's
    getattr(_MODULES[kind], way)(scalar, *sizes, *addresses, *bounds, threads.get_num_threads())


def _on_arrays(kernels: ModuleType, kind: str, way: str, sizes: tuple, tensors: Sequence[Any]) -> None:
    """The same by the functions of a backend's module, which take arrays."""
    arrays = [None if tensor is None else tensor.numpy() for tensor in tensors]
    _call(kernels, kind, way, sizes, arrays)


def _on_card(kernels: ModuleType, kind: str, way: str, sizes: tuple, tensors: Sequence[Any]) -> None:
    """The same for tensors on a card, by the functions of the CUDA backend."""
    device = tensors[0].device
    with torch_cuda.current(device), torch_cuda.lent_room(device):
        _call(kernels, kind, way, sizes, torch_cuda.described(tensors))


def _call(kernels: ModuleType, kind: str, way: str, sizes: tuple, arrays: list[Any]) -> None:
    """A backend's function on arrays of its own kind, which takes pointwise kernels as matrices."""
    matrices = {"depthwise": (), "separable": (2, 6), "pointwise": tuple(range(len(arrays)))}
    for i in matrices[kind]:  # the pointwise kernel and its gradient; of a pointwise convolution all but the bias
        if i < len(arrays) and arrays[i] is not None and arrays[i].ndim > 1:
            arrays[i] = arrays[i].reshape(prod(arrays[i].shape[:-1]), arrays[i].shape[-1])
    geometry = () if kind == "pointwise" else sizes[:1]
    getattr(kernels, f"{kind}_{way}")(*geometry, *arrays)


_IN_FLOAT32 = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_TAKEN = [getattr(torch, name) for name in cpu.FORWARD_HALVES]
_FORWARD = {half: single for half, single in _IN_FLOAT32.items() if half not in _TAKEN}
_DEVICES = {"cpu": Device({"forward": _FORWARD, "backward": _IN_FLOAT32}, _on_cpu)}


def _kernels_on(device: torch.device) -> Device:
    """What computes on `device`.

    Raises:
        RuntimeError: nothing does; the message says what is missing.
        ValueError: it is a card, and the backend that was set is neither "auto" nor "cuda".
    """
    if device.type in _DEVICES:
        kernels = dispatch.kernels()
        if device.type == "cpu" and kernels is not cpu:
            return Device({"forward": _IN_FLOAT32, "backward": _IN_FLOAT32}, partial(_on_arrays, kernels))
        return _DEVICES[device.type]
    missing: str | None = "there are kernels for the CPU and for CUDA only"
    if device.type == "cuda":
        missing = dispatch.obstacle("cuda")
        if missing is None:
            return Device({"forward": {}, "backward": {}}, partial(_on_card, dispatch.kernels_on_card()))
    raise RuntimeError(f"fastsepconv cannot compute where x is, on {device}: {missing}.")
