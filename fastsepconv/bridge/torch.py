"""Separable, depthwise and pointwise convolution of PyTorch tensors.

For eager code, `torch.compile` and `torch.func`, differentiable to any order: custom operators whose kernels are this
package's. They work on the tensors' own memory, unless that is not contiguous.

x is `[N,H,W,C]`, or `[N,C,H,W]` under "channels_first", where `torch.channels_last` memory spares a copy. Tensors,
variables of Keras's and arrays are taken; float16 and bfloat16 are computed in float32. Under `torch.autocast` the
operands are cast as for PyTorch's own convolutions. Tensors on a card are computed there, on the current stream, by the
CUDA kernels; the README tells which of them have run on one.
"""

from __future__ import annotations

import torch

from .. import checks, dispatch
from ..kernels.cpu import threads
from . import torch_ops
from .static_shapes import window


def separable_conv2d(
    x,
    depthwise_kernel,
    pointwise_kernel,
    bias=None,
    *,
    strides=(1, 1),
    padding="valid",
    dilation_rate=(1, 1),
    data_format="channels_last",
    order="depthwise_pointwise",
) -> torch.Tensor:
    """Depthwise convolution followed by pointwise convolution, in one pass.

    Args:
        x: `[N,H,W,C]`.
        depthwise_kernel: `[R,S,C,M]`.
        pointwise_kernel: `[1,1,C*M,F]` or `[C*M,F]`.
        bias: `[F]` or None.
        strides, dilation_rate: a positive integer or a pair of them.
        padding: "valid", "same" (as TensorFlow pads) or `((top, bottom), (left, right))`.
        order: "pointwise_depthwise" convolves the other way round: pointwise_kernel `[1,1,C,F]`, then
            depthwise_kernel `[R,S,F,M]`, bias `[F*M]`, with F*M output channels.

    Returns: `[N,P,Q,F]`, of x's dtype (autocast's, where that is on).

    Raises:
        TypeError: a dtype is not floating, or not x's.
        ValueError: another argument is wrong, or the kernel does not fit into the padded image; or x is on a card and
            the backend that was set is neither "auto" nor "cuda".
        RuntimeError: there are no kernels for the device that x is on.
    """
    if checks.order(order) == "pointwise_depthwise":
        mixed = pointwise_conv2d(x, pointwise_kernel, data_format=data_format)
        return depthwise_conv2d(
            mixed, depthwise_kernel, bias,
            strides=strides, padding=padding, dilation_rate=dilation_rate, data_format=data_format,
        )  # fmt: skip
    operands = {"x": x, "depthwise_kernel": depthwise_kernel, "pointwise_kernel": pointwise_kernel}
    return _convolve("separable", operands, bias, window(strides, padding, dilation_rate), data_format)


def depthwise_conv2d(
    x,
    depthwise_kernel,
    bias=None,
    *,
    strides=(1, 1),
    padding="valid",
    dilation_rate=(1, 1),
    data_format="channels_last",
) -> torch.Tensor:
    """Each channel convolved with filters of its own: x `[N,H,W,C]`, depthwise_kernel `[R,S,C,M]` -> `[N,P,Q,C*M]`.

    bias is `[C*M]` or None. Other arguments and errors as in `separable_conv2d`.
    """
    operands = {"x": x, "depthwise_kernel": depthwise_kernel}
    return _convolve("depthwise", operands, bias, window(strides, padding, dilation_rate), data_format)


def pointwise_conv2d(x, pointwise_kernel, bias=None, *, data_format="channels_last") -> torch.Tensor:
    """Each pixel's channels mixed: x `[N,H,W,C]`, pointwise_kernel `[1,1,C,F]` or `[C,F]` -> `[N,H,W,F]`.

    bias is `[F]` or None. Errors as in `separable_conv2d`.
    """
    return _convolve("pointwise", {"x": x, "pointwise_kernel": pointwise_kernel}, bias, {}, data_format)


def status() -> dict[str, object]:
    """How tensors reach the kernels, the backend for those on the CPU, and PyTorch's version."""
    return {"path": "custom operators", "backend": dispatch.explain().name, "torch": torch.__version__}


def synchronize() -> None:
    """Wait until all that was put on cards is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def exact_float32() -> None:
    """From now on PyTorch's own products of float32 take no shortcuts on a card."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _convolve(kind: str, operands: dict, bias, attributes: dict, data_format: str) -> torch.Tensor:
    channels_first = checks.data_format(data_format) == "channels_first"
    x = _tensor(operands.pop("x"))
    tensors = [x, *(_tensor(value, x) for value in operands.values())]
    bias = None if bias is None else _tensor(bias, x)
    if _autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [tensor.to(dtype) for tensor in tensors]
        bias = None if bias is None else bias.to(dtype)
    if channels_first:
        if x.ndim != 4:
            raise checks.invalid("x", "4 dimensions", tuple(x.shape), ".shape")
        tensors[0] = tensors[0].permute(0, 2, 3, 1)
    y = torch_ops.forward(kind, tensors, bias, tuple(attributes.values()))
    return y.permute(0, 3, 1, 2) if channels_first else y


def _tensor(value, x: torch.Tensor | None = None) -> torch.Tensor:
    """`value` as a tensor; what is none yet becomes one of x's dtype and device."""
    if not isinstance(value, torch.Tensor):
        value = getattr(value, "value", value)  # a variable of Keras's
    if isinstance(value, torch.Tensor):
        return value
    return torch.as_tensor(value) if x is None else torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on where x is; float64 it leaves alone."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype is not torch.float64


threads.ensure_started()
