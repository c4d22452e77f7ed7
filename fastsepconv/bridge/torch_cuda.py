"""PyTorch tensors on a card as kernels are given them: described where they are, on PyTorch's current stream.

Nothing is copied and nothing waited for. The stream is read at each call, so that work which the caller put on one, or
is capturing into a CUDA graph, stays in its order; in the backward pass autograd sets it to that of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from ..device_arrays import DEFAULT_STREAM
from ..kernels.device_array import DeviceArray, Dtype

_DTYPES = {getattr(torch, name): Dtype(name) for name in ("float16", "bfloat16", "float32", "float64")}


def current(device: torch.device) -> AbstractContextManager:
    """Within it `device` is the thread's current card; the kernels turn to it, and others may have one of their own."""
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """The driver's handle of the stream that PyTorch uses on `device` now."""
    return torch.cuda.current_stream(device).cuda_stream or DEFAULT_STREAM


def described(tensors: Sequence[torch.Tensor | None]) -> list[DeviceArray | None]:
    """The tensors, contiguous and on one card, as arrays for the kernels; they hold on to the tensors."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    stream, card = current_stream(device), device.index or 0
    return [
        None if tensor is None
        else DeviceArray(
            tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), _DTYPES[tensor.dtype], card, stream, True, tensor
        )
        for tensor in tensors
    ]  # fmt: skip
