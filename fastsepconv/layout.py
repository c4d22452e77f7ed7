"""From the caller's arrays to those that kernels take, and back: dtype, byte order, memory order, data format, `out`.

Kernels take C-contiguous, aligned, channels-last arrays of one dtype: float32 or float64, or a half that they know.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np

from . import checks, device_arrays

IMAGES = ("x", "dy")  # the arguments that have a data format
LARGEST = 2**63 - 1  # bytes that an address can count


def channels_last(array: np.ndarray, data_format: str) -> np.ndarray:
    """A view `[N,H,W,C]` of an array in `data_format`."""
    return array if data_format == "channels_last" else array.transpose(0, 2, 3, 1)


def from_channels_last(array: np.ndarray, data_format: str) -> np.ndarray:
    """A view in `data_format` of an array `[N,H,W,C]`."""
    return array if data_format == "channels_last" else array.transpose(0, 3, 1, 2)


def shape_in(data_format: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the shape `[N,H,W,C]` is called in `data_format`."""
    return shape if data_format == "channels_last" else (shape[0], shape[3], *shape[1:3])


def receive(data_format: str, **arguments: object) -> dict[str, np.ndarray]:
    """The array arguments of a call, each checked by itself, images as channels-last views; a bias of None left out.

    Arrays on a card come as DeviceArrays, and then all of them do.
    """
    arguments = device_arrays.receive(arguments)
    image = "NHWC" if checks.data_format(data_format) == "channels_last" else "NCHW"
    letters = {"depthwise_kernel": "RSCM", "bias": "F"}
    arrays = {}
    for name, value in arguments.items():
        if name == "pointwise_kernel":
            arrays[name] = checks.pointwise_kernel(value)
        elif name in IMAGES:
            arrays[name] = channels_last(checks.array(name, value, image), data_format)
        elif value is not None or name != "bias":
            arrays[name] = checks.array(name, value, letters[name])
    return arrays


def common_dtype(arrays: Iterable[np.ndarray]) -> np.dtype:
    """The smallest supported dtype that holds all of them, in native byte order: NumPy's promotion.

    float16 with bfloat16, which NumPy refuses, gives float32.
    """
    dtypes = {array.dtype.newbyteorder("=") for array in arrays}
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype("float64" if np.dtype("float64") in dtypes else "float32")


def working_dtype(dtype: np.dtype, halves: Collection[str] = ()) -> np.dtype:
    """What kernels are handed where the result has `dtype`: half types but those of `halves` go through float32."""
    as_it_is = dtype.type in (np.float32, np.float64) or dtype.name in halves
    return dtype if as_it_is else np.dtype("float32")


def is_half(dtype) -> bool:
    """Whether kernels hold sums of this dtype, NumPy's or one on a card, in a wider one."""
    return dtype.name in ("float16", "bfloat16")


def for_kernels(arrays: dict[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The arrays as kernels take them, in the dtype that these compute in; copies only where they have to be."""
    return {name: array if _fits(array, dtype) else _copy(name, array, dtype) for name, array in arrays.items()}


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    flags = array.flags
    return array.dtype == dtype and flags.c_contiguous and flags.aligned


def _copy(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(array, dtype, order="C")
    except (MemoryError, ValueError) as error:
        expected = f"an array that can be copied into memory ({error})"
        raise checks.invalid(name, expected, array.shape, ".shape") from error


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array; where memory cannot hold it, the sizes of `x` are to blame."""
    try:
        if math.prod(shape) * dtype.itemsize > LARGEST:
            raise MemoryError("more bytes than an address can count")
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:  # ValueError for an empty batch of images that are too large
        expected = f"sizes whose results fit in memory ({error})"
        raise checks.invalid("x", expected, shape, " with a result of shape") from error


def room_in(out: np.ndarray, data_format: str, dtype: np.dtype, inputs: Iterable[np.ndarray]) -> np.ndarray | None:
    """A channels-last view of `out` that kernels can write to while they read `inputs`, or None if there is none."""
    view = channels_last(np.asarray(out), data_format)
    apart = _fits(view, dtype) and not any(np.may_share_memory(view, array) for array in inputs)
    return view if apart else None


def deliver(result: np.ndarray, out: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """`result` in the caller's dtype: in `out`, or as a C-contiguous array."""
    with np.errstate(over="ignore", invalid="ignore"):
        if out is None:
            return np.asarray(result, dtype, order="C")
        out[...] = result
    return out
