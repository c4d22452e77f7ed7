"""Separable, depthwise and pointwise convolution of TensorFlow tensors.

For eager code and graphs, differentiable to any order, with no copies: TensorFlow ops whose kernels are this
package's. Where TensorFlow's C API cannot be had (or FASTSEPCONV_TF_BRIDGE=numpy_function), `tf.numpy_function` stands
in, with a warning. To load a SavedModel that holds these ops, import this module first: that makes them known.

The backend is that of `set_backend` when an operation runs, or when the graph that holds it is built. Tensors on a GPU
of TensorFlow's are computed there by the CUDA kernels under "auto" and "cuda" (`tensorflow_card`); whether they have
been on one, the README tells. Otherwise backends other than the CPU's take the way of `tf.numpy_function` too: on
"cuda" what TensorFlow holds on the CPU is copied to the card and back.

x is `[N,H,W,C]`, or `[N,C,H,W]` under "channels_first". Tensors, variables and arrays are taken; float16 and bfloat16
are computed in float32, but for the forward pass of bfloat16 on a CPU that multiplies it by itself.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import tensorflow as tf

from .. import checks, dispatch
from ..kernels import cpu
from ..kernels.cpu import threads
from .static_shapes import window
from .tensorflow_fork import refuse_in_child

MODE_VARIABLE = "FASTSEPCONV_TF_BRIDGE"

_HALF = frozenset((tf.float16, tf.bfloat16))
_DTYPES = _HALF | {tf.float32, tf.float64}


@tf.autograph.experimental.do_not_convert
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
) -> tf.Tensor:
    """Depthwise convolution followed by pointwise convolution, in one pass.

    Args:
        x: `[N,H,W,C]`.
        depthwise_kernel: `[R,S,C,M]`.
        pointwise_kernel: `[1,1,C*M,F]` or `[C*M,F]`.
        bias: `[F]` or None.
        strides, dilation_rate: a positive integer or a pair of them.
        padding: "valid", "same" or `((top, bottom), (left, right))`.
        order: "pointwise_depthwise" convolves the other way round: pointwise_kernel `[1,1,C,F]`, then
            depthwise_kernel `[R,S,F,M]`, bias `[F*M]`, with F*M output channels.

    Returns: `[N,P,Q,F]`, of x's dtype.

    Raises:
        TypeError: a dtype is not floating, or not x's.
        ValueError: an argument, or a shape known while a graph is built, is wrong.
        tf.errors.InvalidArgumentError: a shape is wrong when the operation runs.
        RuntimeError: this process was forked after TensorFlow had started its threads.
    """
    if checks.order(order) == "pointwise_depthwise":
        mixed = pointwise_conv2d(x, pointwise_kernel, data_format=data_format)
        return depthwise_conv2d(
            mixed, depthwise_kernel, bias,
            strides=strides, padding=padding, dilation_rate=dilation_rate, data_format=data_format,
        )  # fmt: skip
    operands = {"x": x, "depthwise_kernel": depthwise_kernel, "pointwise_kernel": pointwise_kernel}
    return _convolve("Separable", operands, bias, _window(strides, padding, dilation_rate), data_format)


@tf.autograph.experimental.do_not_convert
def depthwise_conv2d(
    x,
    depthwise_kernel,
    bias=None,
    *,
    strides=(1, 1),
    padding="valid",
    dilation_rate=(1, 1),
    data_format="channels_last",
) -> tf.Tensor:
    """Each channel convolved with filters of its own: x `[N,H,W,C]`, depthwise_kernel `[R,S,C,M]` -> `[N,P,Q,C*M]`.

    bias is `[C*M]` or None. Other arguments and errors as in `separable_conv2d`.
    """
    operands = {"x": x, "depthwise_kernel": depthwise_kernel}
    return _convolve("Depthwise", operands, bias, _window(strides, padding, dilation_rate), data_format)


@tf.autograph.experimental.do_not_convert
def pointwise_conv2d(x, pointwise_kernel, bias=None, *, data_format="channels_last") -> tf.Tensor:
    """Each pixel's channels mixed: x `[N,H,W,C]`, pointwise_kernel `[1,1,C,F]` or `[C,F]` -> `[N,H,W,F]`.

    bias is `[F]` or None. Errors as in `separable_conv2d`.
    """
    return _convolve("Pointwise", {"x": x, "pointwise_kernel": pointwise_kernel}, bias, (), data_format)


def status() -> dict[str, object]:
    """Which way tensors take into the kernels: `path` is "c-api" or "numpy_function", `reason` says why."""
    path, reason, _ = _implementation()
    backend = dispatch.explain().name
    if path == "c-api" and dispatch.get_backend() in ("auto", "cuda") and _card_obstacle() is None:
        elsewhere = "by the CPU's kernels" if backend == "cpu" else "as NumPy arrays"
        reason = f"tensors on TensorFlow's GPU are computed where they are, others {elsewhere}"
    elif backend != "cpu":
        path, reason = "numpy_function", f"the {backend} backend is handed NumPy arrays"
    return {"path": path, "reason": reason, "backend": backend, "tensorflow": tf.__version__}


def synchronize() -> None:
    """Wait until all that was put on cards is done."""
    if tf.config.list_logical_devices("GPU"):
        tf.test.experimental.sync_devices()


def exact_float32() -> None:
    """From now on TensorFlow's own products of float32 take no shortcuts on a card."""
    tf.config.experimental.enable_tensor_float_32_execution(False)


def _forward(x: tf.Tensor) -> Callable[..., tf.Tensor]:
    """What computes an operation on x: the ops, whose kernels are the CPU's or, for tensors there, a card's; those of
    another backend on arrays.
    """
    kernels = dispatch.kernels()
    path, _, implementation = _implementation()
    if kernels is cpu or (path == "c-api" and _runs_on_card(x)):
        return implementation.forward
    from . import tensorflow_numpy

    return functools.partial(tensorflow_numpy.forward, kernels=kernels)


def _takes(half: tf.DType) -> bool:
    """Whether the ops take tensors of a half type as they are: where no GPU is that TensorFlow may run them on."""
    if half.name not in cpu.FORWARD_HALVES or _implementation()[0] != "c-api" or dispatch.kernels() is not cpu:
        return False
    from .tensorflow_registration import CARD  # which needs the C API

    return not tf.config.list_logical_devices(CARD)


def _runs_on_card(x: tf.Tensor) -> bool:
    from . import tensorflow_card  # which needs the C API

    return dispatch.get_backend() == "cuda" and tensorflow_card.takes(x)


def _card_obstacle() -> str | None:
    from . import tensorflow_card

    return tensorflow_card.obstacle()


def _convolve(kind: str, operands: dict, bias, attributes: tuple, data_format: str) -> tf.Tensor:
    refuse_in_child()
    x, *others = operands
    tensors = [_tensor(x, operands[x])]
    dtype = tensors[0].dtype
    tensors += [_tensor(name, operands[name], dtype) for name in others]
    bias = None if bias is None else _tensor("bias", bias, dtype)
    channels_first = checks.data_format(data_format) == "channels_first"
    if channels_first:
        tensors[0] = tf.transpose(tensors[0], (0, 2, 3, 1))
    if dtype in _HALF and not _takes(dtype):
        tensors = [tf.cast(tensor, tf.float32) for tensor in tensors]
        bias = None if bias is None else tf.cast(bias, tf.float32)
    y = _forward(tensors[0])(kind, tensors, bias, attributes)
    if y.dtype is not dtype:
        y = tf.cast(y, dtype)
    return tf.transpose(y, (0, 3, 1, 2)) if channels_first else y


def _tensor(name: str, value, dtype: tf.DType | None = None) -> tf.Tensor:
    """`value` as a tensor of `dtype`; of any floating one where none is given."""
    if not isinstance(value, tf.Tensor):
        value = tf.convert_to_tensor(value, dtype_hint=dtype)
    if dtype is None and value.dtype not in _DTYPES:
        raise checks.invalid(name, "dtype " + ", ".join(checks.FLOAT_NAMES), value.dtype.name, ".dtype", TypeError)
    if dtype is not None and value.dtype is not dtype:
        raise checks.invalid(name, f"x's dtype, {dtype.name}", value.dtype.name, ".dtype", TypeError)
    return value


def _window(strides, padding, dilation_rate) -> tuple:
    """The attributes of an op that moves a window, as alternating names and values."""
    return tuple(part for attribute in window(strides, padding, dilation_rate).items() for part in attribute)


@functools.cache
def _implementation() -> tuple[str, str, ModuleType]:
    """(path, reason, module): the module's `forward` computes."""
    mode = os.environ.get(MODE_VARIABLE, "c-api") or "c-api"
    if mode not in ("c-api", "numpy_function"):
        raise ValueError(
            f"Invalid value for environment variable `{MODE_VARIABLE}`. Expected c-api or numpy_function. "
            f"Received: {mode}"
        )
    threads.ensure_started()
    reason = f"{MODE_VARIABLE} asks for it"
    if mode == "c-api":
        try:
            from . import tensorflow_ops

            return "c-api", "TensorFlow's C API takes compiled kernels", tensorflow_ops
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            reason = f"TensorFlow's C API cannot be had: {error}"
    from . import tensorflow_numpy

    warnings.warn(
        f"fastsepconv works in TensorFlow through tf.numpy_function, which is slower: {reason}.", stacklevel=2
    )
    return "numpy_function", reason, tensorflow_numpy


_implementation()
