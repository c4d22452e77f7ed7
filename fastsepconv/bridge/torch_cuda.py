"""PyTorch tensors on a card as kernels are given them: described where they are, on PyTorch's current stream.

Nothing is copied and nothing waited for. The stream is read at each call, so that work which the caller put on one, or
is capturing into a CUDA graph, stays in its order; in the backward pass autograd sets it to that of the forward pass.
Whether this way has been gone on a card, the README tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

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


@contextmanager
def lent_room(device: torch.device) -> Iterator[None]:
    """Within it, on PyTorch's current stream, what the kernels need for themselves is PyTorch's memory too.

    So it lies in the pools of PyTorch's allocator: a call waits for no memory of the driver's, and a CUDA graph that is
    being captured has it in its private pool, where it stays for the replays.
    """
    from ..kernels.cuda import memory

    held: list[torch.Tensor] = []

    def room(size: int) -> int:
        held.append(new_bytes(size, device))
        return held[-1].data_ptr()

    # PyTorch's memory is that of the stream which was current when it was given, here the one that the kernels are
    # launched on: what used it before was put there earlier, and once `held` lets go of it, which is before the kernels
    # have run, PyTorch gives it only to what is put there later.
    with memory.room_from(room):
        yield


def new_bytes(size: int, device: torch.device) -> torch.Tensor:
    """Memory that nothing is written to."""
    return torch.empty(size, dtype=torch.uint8, device=device)


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
