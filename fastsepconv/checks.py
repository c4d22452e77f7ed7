"""The rules of the arguments, each once, in one sentence form."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .kernels.device_array import DeviceArray
from .kernels.geometry import Geometry, Padding, Pair, effective_size, resolve

# Strides, dilation rates, padding and a kernel's span stay below this, so that no sum or product of two of them and
# an image's size leaves the 64 bits that the kernels count in. (TensorFlow's own limit is the same.)
LIMIT = 2**31 - 1

FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")
_NUMPYS_FLOATS = (np.float16, np.float32, np.float64)  # bfloat16 is known by its name alone: it comes from ml_dtypes


def invalid(name: str, expected: str, received: object, detail: str = "", kind: type[Exception] = ValueError):
    """The exception, to be raised by the caller, that says what `name` should be and what `name` + `detail` is."""
    return kind(f"Invalid value for argument `{name}`. Expected {expected}. Received: {name}{detail}={received!r}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """`value`, which has to be one of the strings `allowed`."""
    if isinstance(value, str) and value in allowed:
        return value
    raise invalid(name, "one of " + ", ".join(map(repr, allowed)), value)


def data_format(value: object) -> str:
    """ "channels_last" or "channels_first"."""
    return one_of("data_format", value, ("channels_last", "channels_first"))


def order(value: object) -> str:
    """Which of a separable convolution's two steps comes first."""
    return one_of("order", value, ("depthwise_pointwise", "pointwise_depthwise"))


def integer(value: object, least: int) -> int | None:
    """`value` as an int, or None where it is none or lies outside `least` .. LIMIT."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if least <= number <= LIMIT else None


def _items(value: object) -> tuple:
    sequence = isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.ndim > 0)
    return tuple(value) if sequence else ()  # type: ignore[arg-type]


def positive_pair(name: str, value: object) -> Pair:
    """Strides or a dilation rate: a positive integer for both axes, or one for each."""
    both = integer(value, least=1)
    pair = (both, both) if both is not None else tuple(integer(item, least=1) for item in _items(value))
    if len(pair) != 2 or None in pair:
        raise invalid(name, "a positive integer below 2**31 or a pair of them", value)
    return pair


def padding(value: object) -> Padding:
    """ "valid" or "same" in any case, or `((top, bottom), (left, right))` in whole zeros."""
    if isinstance(value, str) and value.lower() in ("valid", "same"):
        return value.lower()
    pairs = tuple(tuple(integer(item, least=0) for item in _items(pair)) for pair in _items(value))
    if len(pairs) != 2 or any(len(pair) != 2 or None in pair for pair in pairs):
        expected = '"valid", "same" or ((top, bottom), (left, right)) in integers from 0 to 2**31-1'
        raise invalid("padding", expected, value)
    return pairs


def _floats(name: str, value: object) -> np.ndarray:
    """`value` as a NumPy array of a supported dtype; a DeviceArray, which has one, as it is."""
    if isinstance(value, DeviceArray):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise invalid(name, f"an array ({error})", type(value), " of type", TypeError) from error
    if array.dtype.type not in _NUMPYS_FLOATS and array.dtype.name != "bfloat16":
        raise invalid(name, f"an array of dtype {', '.join(FLOAT_NAMES)}", array.dtype.name, ".dtype", TypeError)
    return array


def _axes(name: str, array: np.ndarray, letters: str) -> np.ndarray:
    """`array`, which has to have one axis a letter; only the batch, N, may be empty."""
    if array.ndim != len(letters):
        raise invalid(name, f"an array of rank {len(letters)}, [{','.join(letters)}]", array.shape, ".shape")
    if any(size == 0 for size, letter in zip(array.shape, letters, strict=True) if letter != "N"):
        but = " but N" if "N" in letters else ""
        raise invalid(name, f"[{','.join(letters)}] with every size{but} at least 1", array.shape, ".shape")
    return array


def array(name: str, value: object, letters: str) -> np.ndarray:
    """`value` as a NumPy array of a supported dtype with one axis a letter; only the batch, N, may be empty."""
    return _axes(name, _floats(name, value), letters)


def pointwise_kernel(value: object) -> np.ndarray:
    """`value` as a pointwise kernel, `[1,1,K,F]` or `[K,F]`."""
    name = "pointwise_kernel"
    kernel = _floats(name, value)
    _axes(name, kernel, "KF" if kernel.ndim == 2 else "11KF")
    if kernel.shape[:-2] not in ((), (1, 1)):
        raise invalid(name, "an array of shape [1,1,K,F] or [K,F]", kernel.shape, ".shape")
    return kernel


def size(name: str, array: np.ndarray, axis: int, expected: int, why: str) -> None:
    """Hold `array.shape[axis]` to the size that `why` explains."""
    if array.shape[axis] != expected:
        raise invalid(name, f"{expected} at axis {axis % array.ndim} ({why})", array.shape, ".shape")


def shape(name: str, array: Any, expected: tuple[int, ...], why: str) -> None:
    """Hold `array.shape` to the shape that `why` explains."""
    if array.shape != expected:
        raise invalid(name, f"an array of shape {expected}, {why}", array.shape, ".shape")


def geometry(x_shape: tuple, kernel_shape: tuple, strides: object, pad: object, dilation_rate: object) -> Geometry:
    """The Geometry of a depthwise convolution of `[N,H,W,C]` by `[R,S,C,M]` with some output and no overflow."""
    strides, dilation = positive_pair("strides", strides), positive_pair("dilation_rate", dilation_rate)
    pad = padding(pad)
    spans = [effective_size(taps, rate) for taps, rate in zip(kernel_shape[:2], dilation, strict=True)]
    if max(spans) > LIMIT:
        raise invalid("dilation_rate", "a kernel that spans less than 2**31 pixels", dilation)
    g = resolve(x_shape, kernel_shape, strides, pad, dilation)
    if not (g.out_height and g.out_width):
        image = f"a {x_shape[1]}x{x_shape[2]} image with padding {pad!r}"
        wanted = f"a kernel that fits in {image}; with dilation_rate {dilation} this one spans {spans[0]}x{spans[1]}"
        raise invalid("depthwise_kernel", wanted, kernel_shape, ".shape")
    return g


def output(out: object, expected: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`out`, which has to be a writable array of just the result's shape and dtype, no element in another's place."""
    if not isinstance(out, np.ndarray):
        raise invalid("out", "a NumPy array or None", type(out), " of type", TypeError)
    if out.dtype != dtype:
        raise invalid("out", f"an array of the result's dtype, {dtype.name}", out.dtype, ".dtype", TypeError)
    shape("out", out, expected, "the result's shape")
    if not out.flags.writeable:
        raise invalid("out", "a writable array", False, ".flags.writeable")
    if not _elements_lie_apart(out):
        raise invalid("out", "an array whose elements lie apart in memory", out.strides, ".strides")
    return out


def _elements_lie_apart(array: np.ndarray) -> bool:
    """Whether each axis steps over all that the shorter steps reach; the views of an array that NumPy slices do."""
    if array.size == 0:  # its strides may be anything: NumPy's are zeros
        return True
    reach = array.itemsize
    for step, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if size > 1 and step < reach:
            return False
        reach += step * (size - 1)
    return True
