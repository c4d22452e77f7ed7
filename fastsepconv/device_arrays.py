"""Arrays on a card, of whatever library: taken where they are, results given back as arrays of the same library.

Read are `__cuda_array_interface__` and, where an array has none, DLPack. Nothing is copied and nothing waited for: work
goes to the stream on which the caller's arrays are used, as the interface's version 3 or the library tells it, else
to the card's default stream.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from . import checks, dlpack
from .kernels.device_array import DeviceArray, Dtype, contiguous_strides

DEFAULT_STREAM = 1  # the driver's own name for the stream with which all others keep step
_TYPE_STRINGS = {"<f2": "float16", "<f4": "float32", "<f8": "float64"}
_EXPECTED = "an array of dtype " + ", ".join(checks.FLOAT_NAMES)
_READ_ONLY_LIBRARIES = ("jax", "jaxlib", "tensorflow")  # whose arrays nobody may write to


def new(like: DeviceArray, shape: tuple[int, ...], dtype: str | None = None) -> DeviceArray:
    """A new array of the library of `like` on its card, contiguous, its elements unset."""
    return read("out", _empty(like, shape, dtype or like.dtype.name), like.stream)


def is_on_card(value: object) -> bool:
    """Whether `value` is an array in the memory of a card."""
    if isinstance(value, np.ndarray):
        return False
    try:
        return hasattr(value, "__cuda_array_interface__") or dlpack.is_on_card(value)
    except (TypeError, RuntimeError):  # it is on one, and cannot be described: `read` tells why
        return True


def receive(arguments: dict[str, object]) -> dict[str, object]:
    """The arguments of a call, arrays on a card as DeviceArrays. All of them are on one card, or none is on any."""
    on_card = [name for name, value in arguments.items() if value is not None and is_on_card(value)]
    if not on_card:
        return arguments
    in_memory = [name for name, value in arguments.items() if value is not None and name not in on_card]
    if in_memory:
        raise _mixed(on_card, in_memory, arguments)
    first: DeviceArray | None = None
    received: dict[str, object] = {}
    for name, value in arguments.items():
        if value is None:
            received[name] = None
            continue
        array = read(name, value)
        first = first or array
        received[name] = beside(name, array, first)
    return received


def _mixed(on_card: list[str], in_memory: list[str], arguments: dict[str, object]) -> Exception:
    """The error for arrays of which some lie on a card and some do not: what the fewer are is wrong."""
    if len(on_card) <= len(in_memory):
        name, expected = on_card[0], f"an array in the computer's own memory, as `{in_memory[0]}` is"
    else:
        name, expected = in_memory[0], f"an array on a card, as `{on_card[0]}` is"
    return checks.invalid(name, expected, type(arguments[name]), " of type", TypeError)


def beside(name: str, array: DeviceArray, first: DeviceArray) -> DeviceArray:
    """`array`, which has to be on the card of `first` and of its dtype, ordered into that one's stream."""
    if array.dtype != first.dtype:
        raise checks.invalid(name, f"the dtype of `x`, {first.dtype.name}", array.dtype.name, ".dtype", TypeError)
    if array.device != first.device:
        raise checks.invalid(name, f"an array on card {first.device}, where `x` is", array.device, " on card")
    if array.stream != first.stream:
        _order(first, array)
    return array._replace(stream=first.stream)


def read(name: str, value: Any, stream: int | None = None) -> DeviceArray:
    """An array on a card, as it describes itself; `stream`, where it is known, goes before what that says."""
    interface = _interface(name, value)
    array = _from_dlpack(name, value) if interface is None else _from_interface(name, value, interface)
    address, shape, strides, dtype, writable, device, own_stream = array
    if device is None:
        told = _told_card(value)
        device = _card_of(name, address, math.prod(shape)) if told is None else told
    own_stream = _torch_stream(value, device) or own_stream or DEFAULT_STREAM
    strides = contiguous_strides(shape) if strides is None else strides
    if address % Dtype(dtype).itemsize:  # kernels would end with an error that leaves the card unusable
        raise checks.invalid(name, f"{dtype} numbers that lie on multiples of their size", hex(address), " at address")
    return DeviceArray(address, shape, strides, Dtype(dtype), device, stream or own_stream, writable, value)


def activate(name: str, x: DeviceArray, y: DeviceArray) -> None:
    """Fill y with the activation of that name, none of those that only cut off, of x, on their stream."""
    from .kernels.cuda import activations

    activations.run(name, x, y)


def for_kernels(arrays: dict[str, DeviceArray]) -> dict[str, DeviceArray]:
    """The arrays of a call, images as channels-last views, as kernels take them: contiguous, all of them."""
    return {name: _contiguous_one(name, array) for name, array in arrays.items()}


def output(out: Any, data_format: str, shape: tuple[int, ...], inputs: dict[str, DeviceArray]) -> DeviceArray:
    """A channels-last view `[N,P,Q,F]` of `out`, an array on the card that the kernels can write to."""
    if not is_on_card(out):
        raise checks.invalid("out", "an array on a card, as `x` is, or None", type(out), " of type", TypeError)
    array = beside("out", read("out", out), inputs["x"])
    first = data_format == "channels_first"
    checks.shape("out", array, (shape[0], shape[3], *shape[1:3]) if first else shape, "the result's shape")
    if not array.writable:
        raise checks.invalid("out", "a writable array", False, ".writable")
    y = _contiguous_one("out", array.transpose(0, 2, 3, 1) if first else array)
    for name, other in inputs.items():
        if y.address < other.end and other.address < y.end:
            raise checks.invalid("out", f"memory apart from that of `{name}`", hex(y.address), " at address")
    return y


def deliver(y: DeviceArray, data_format: str) -> Any:
    """The caller's kind of array, from a result `[N,P,Q,F]` in `data_format`: a view with the axes in that order."""
    if data_format == "channels_last":
        return y.owner
    if _library(y.owner) == "torch":
        return y.owner.permute(0, 3, 1, 2)
    if hasattr(y.owner, "__array_namespace__"):
        return y.owner.__array_namespace__().permute_dims(y.owner, (0, 3, 1, 2))
    return y.owner.transpose((0, 3, 1, 2))


def _contiguous_one(name: str, array: DeviceArray) -> DeviceArray:
    if not array.is_contiguous:
        expected = "an array whose memory is contiguous and channels-last, since nothing is copied on a card"
        raise checks.invalid(name, expected, array.strides, " with channels-last strides")
    return array


def _interface(name: str, value: Any) -> dict | None:
    """The array's `__cuda_array_interface__`; None where it has none or cannot say its dtype so (bfloat16)."""
    try:
        interface = value.__cuda_array_interface__
    except AttributeError:
        return None
    except (TypeError, RuntimeError) as error:
        if dlpack.is_on_card(value) and "bfloat16" in str(value.dtype).lower():
            return None
        raise checks.invalid(
            name, f"an array that can be used ({error})", type(value), " of type", TypeError
        ) from error
    if interface["typestr"] not in _TYPE_STRINGS and "bfloat16" not in str(getattr(value, "dtype", "")):
        raise checks.invalid(name, _EXPECTED, interface["typestr"], ".dtype", TypeError)
    return interface


def _from_dlpack(name: str, value: Any) -> dlpack.Described:
    """What PyTorch uses already on its current stream need not be brought into another's order."""
    return dlpack.read(name, value, _torch_stream(value, value.__dlpack_device__()[1]) or DEFAULT_STREAM)


def _from_interface(name: str, value: Any, interface: dict) -> dlpack.Described:
    dtype = _TYPE_STRINGS.get(interface["typestr"], "bfloat16")
    if interface.get("mask") is not None:
        raise checks.invalid(name, "an array without a mask", type(value), " of type", TypeError)
    stream = interface.get("stream")
    if stream == 0:
        raise checks.invalid(name, "an array whose stream is not 0, which the interface forbids", stream, ".stream")
    address, read_only = interface["data"]
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    if strides is not None:
        if any(step % Dtype(dtype).itemsize for step in strides):
            raise checks.invalid(name, f"strides of whole {dtype} numbers", strides, " with strides in bytes")
        strides = tuple(step // Dtype(dtype).itemsize for step in strides)
    return dlpack.Described(address or 0, shape, strides, dtype, not read_only, None, stream)


def _told_card(value: Any) -> int | None:
    """The number of the card that an array is on, where its library tells: an empty array has no address to ask of."""
    return {"torch": lambda: value.get_device(), "cupy": lambda: value.device.id}.get(_library(value), lambda: None)()


def _card_of(name: str, address: int, size: int) -> int:
    """The number of the card whose memory an address lies in."""
    from .kernels.cuda import driver

    if driver.SIMULATED or size == 0:
        return 0
    with driver.turned_to(driver.first_device()):
        card = driver.device_of(address)
    if card is None:
        raise checks.invalid(name, "an array in the memory of a card", hex(address), " at the computer's own address")
    return card


def _order(first: DeviceArray, array: DeviceArray) -> None:
    """What runs on the stream of `first` from now on runs after what runs on the stream of `array` now."""
    from .kernels.cuda import driver

    if not driver.SIMULATED:
        on = driver.device(first.device)
        with driver.turned_to(on):
            driver.order_after(driver.Stream(first.stream, on), array.stream)


def _library(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _torch_stream(value: Any, device: int) -> int | None:
    """The stream that PyTorch uses now, which its arrays do not tell; None for arrays of other libraries."""
    if _library(value) != "torch":
        return None
    return sys.modules["torch"].cuda.current_stream(device).cuda_stream or DEFAULT_STREAM


def _empty(like: DeviceArray, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of the library of `like`, on its card."""
    owner = like.owner
    library = _library(owner)
    if library in _READ_ONLY_LIBRARIES:
        expected = "an array of a library whose arrays can be written to"
        raise checks.invalid("x", expected, type(owner), " of type", TypeError)
    if library == "torch":
        return owner.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))
    if library == "cupy":
        with owner.device:
            return sys.modules["cupy"].empty(shape, dtype)
    if library in ("numba", "numba_cuda"):
        from numba import cuda

        with cuda.gpus[like.device]:
            return cuda.device_array(shape, dtype)
    if not hasattr(owner, "__array_namespace__"):
        expected = "an array of PyTorch, CuPy, Numba or a library with `__array_namespace__`"
        raise checks.invalid("x", expected, type(owner), " of type", TypeError)
    namespace = owner.__array_namespace__()
    return namespace.empty(shape, dtype=getattr(namespace, dtype), device=owner.device)
