"""Bad arguments and bad shapes: an exception that names the argument, at whatever time it can be known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow as tf

from fastsepconv.bridge import tensorflow as bridge
from fastsepconv.bridge import tensorflow_ops

BAD_SHAPES = [
    ("x", (2, 5, 3), (3, 3, 3, 1), (1, 1, 3, 4), (4,)),
    ("x", (2, 5, 5, 3, 1), (3, 3, 3, 1), (1, 1, 3, 4), (4,)),
    ("depthwise_kernel", (2, 5, 5, 3), (3, 3, 3), (1, 1, 3, 4), (4,)),
    ("depthwise_kernel", (2, 5, 5, 3), (3, 3, 4, 1), (1, 1, 4, 4), (4,)),
    ("depthwise_kernel", (2, 5, 5, 3), (0, 3, 3, 1), (1, 1, 3, 4), (4,)),
    ("depthwise_kernel", (2, 5, 5, 3), (3, 3, 3, 0), (1, 1, 0, 4), (4,)),
    ("depthwise_kernel", (2, 5, 5, 3), (3, 7, 3, 1), (1, 1, 3, 4), (4,)),
    ("pointwise_kernel", (2, 5, 5, 3), (3, 3, 3, 2), (1, 1, 3, 4), (4,)),
    ("pointwise_kernel", (2, 5, 5, 3), (3, 3, 3, 1), (1, 2, 3, 4), (4,)),
    ("pointwise_kernel", (2, 5, 5, 3), (3, 3, 3, 1), (3, 0), (0,)),
    ("pointwise_kernel", (2, 5, 5, 3), (3, 3, 3, 1), (3,), (4,)),
    ("bias", (2, 5, 5, 3), (3, 3, 3, 1), (1, 1, 3, 4), (5,)),
    ("bias", (2, 5, 5, 3), (3, 3, 3, 1), (1, 1, 3, 4), (1, 4)),
]


@pytest.mark.parametrize(("argument", "x", "depthwise", "pointwise", "bias"), BAD_SHAPES)
def test_bad_shapes(argument, x, depthwise, pointwise, bias):
    tensors = [tf.ones(shape) for shape in (x, depthwise, pointwise, bias)]
    message = f"Invalid value for argument `{argument}`"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        bridge.separable_conv2d(*tensors)
    with pytest.raises(ValueError, match=message):
        tf.function(bridge.separable_conv2d)(*tensors)
    unknown = tf.function(bridge.separable_conv2d, input_signature=[tf.TensorSpec(None)] * 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        unknown(*tensors)


@pytest.mark.parametrize("function", [bridge.depthwise_conv2d, bridge.pointwise_conv2d])
def test_bad_shapes_of_the_single_steps(function):
    kernel = tf.ones((3, 3, 4, 1) if function is bridge.depthwise_conv2d else (1, 1, 4, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Invalid value for argument `(depth|point)wise_kernel`"):
        function(tf.ones((2, 5, 5, 3)), kernel)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Invalid value for argument `bias`"):
        function(tf.ones((2, 5, 5, 4)), kernel, tf.ones(3))


@pytest.mark.parametrize(("kind", "kernels"), [
    ("Separable", [(3, 3, 3, 1), (1, 1, 3, 4)]), ("Depthwise", [(3, 3, 3, 1)]), ("Pointwise", [(1, 1, 3, 4)]),
])  # fmt: skip
def test_gradient_of_another_shape(kind, kernels):
    operands = [tf.ones((2, 5, 5, 3)), *map(tf.ones, kernels)]
    window = () if kind == "Pointwise" else bridge._window(1, "valid", 1)
    for dy in (tf.ones((2, 3, 3, 9)), tf.ones((3, 3, 4)), tf.ones((0, 3, 3, 4))):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Invalid value for argument `dy`"):
            tensorflow_ops.backward(kind, operands, dy, window, [True] * (len(operands) + 1))


@pytest.mark.parametrize("attribute", [("strides", [0, 1]), ("dilations", [1, -1]), ("padding", [0, -1, 0, 0])])
def test_bad_attributes_of_a_node(attribute):
    """As a graph made by other hands may hold them."""
    window = dict(zip(*[iter(bridge._window(1, "valid", 1))] * 2, strict=True)) | dict([attribute])
    flat = tuple(part for item in window.items() for part in item)
    with pytest.raises(tf.errors.OpError, match=f"Invalid value for argument `{attribute[0]}`"):
        tensorflow_ops.forward("Depthwise", [tf.ones((1, 4, 4, 1)), tf.ones((2, 2, 1, 1))], None, flat)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"strides": 0}, "strides"),
        ({"strides": (1, 2, 3)}, "strides"),
        ({"dilation_rate": -1}, "dilation_rate"),
        ({"padding": "full"}, "padding"),
        ({"padding": ((1, 1), (1, -1))}, "padding"),
        ({"data_format": "NHWC"}, "data_format"),
        ({"order": "both"}, "order"),
    ],
)
def test_bad_options(options, argument):
    with pytest.raises(ValueError, match=f"Invalid value for argument `{argument}`"):
        bridge.separable_conv2d(tf.ones((1, 4, 4, 1)), tf.ones((2, 2, 1, 1)), tf.ones((1, 1, 1, 1)), **options)


@pytest.mark.parametrize("bad", [tf.int32, tf.bool, tf.complex64, tf.string])
def test_bad_dtypes(bad):
    x = tf.zeros((1, 4, 4, 1), bad)
    with pytest.raises(TypeError, match=r"Invalid value for argument `x`.*x.dtype"):
        bridge.depthwise_conv2d(x, tf.ones((2, 2, 1, 1)))
    with pytest.raises(TypeError, match="Invalid value for argument `depthwise_kernel`"):
        bridge.depthwise_conv2d(tf.ones((1, 4, 4, 1)), tf.zeros((2, 2, 1, 1), bad))


def test_mixed_dtypes():
    with pytest.raises(TypeError, match=r"Invalid value for argument `bias`. Expected x's dtype, float32.*float64"):
        bridge.depthwise_conv2d(tf.ones((1, 4, 4, 1)), tf.ones((2, 2, 1, 1)), tf.ones(1, tf.float64))


@pytest.mark.parametrize("padding", [((2**31 - 1, 2**31 - 1),) * 2, ((2**20, 2**20),) * 2])
def test_a_result_beyond_all_memory(padding):
    x = tf.ones((2, 4, 4, 2))
    with pytest.raises(tf.errors.ResourceExhaustedError):
        bridge.separable_conv2d(x, tf.ones((2, 2, 2, 1)), tf.ones((1, 1, 2, 70000)), padding=padding)


def test_a_dilation_beyond_counting():
    with pytest.raises(tf.errors.InvalidArgumentError, match="`depthwise_kernel`"):
        bridge.depthwise_conv2d(tf.ones((1, 4, 4, 1)), tf.ones((3, 2, 1, 1)), padding="same", dilation_rate=2**31 - 1)


def test_an_error_leaves_the_next_call_whole():
    x, kernel = tf.ones((1, 4, 4, 1)), tf.ones((2, 2, 1, 1))
    for _ in range(50):
        with pytest.raises(tf.errors.InvalidArgumentError):
            bridge.depthwise_conv2d(x, tf.ones((2, 2, 3, 1)))
        np.testing.assert_array_equal(bridge.depthwise_conv2d(x, kernel), np.full((1, 3, 3, 1), 4.0))


def test_an_interrupt_where_a_kernel_is_made_is_a_tensorflow_error(monkeypatch):
    """Ctrl-C raises before the first line of whatever Python function is called next; here, it was the maker."""

    def interrupt(frame, event, argument):
        if event == "call" and frame.f_code.co_name == "_make_state":
            raise KeyboardInterrupt

    def raised(unraisable):
        ignored.append(unraisable.exc_type)

    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", raised)
    tensors = tf.ones((1, 5, 5, 3)), tf.ones((3, 3, 3, 1))
    sys.setprofile(interrupt)
    try:
        with pytest.raises(tf.errors.CancelledError, match="interrupted while a kernel of fastsepconv was made"):
            bridge.depthwise_conv2d(*tensors, padding=((1, 3), (2, 0)))
    finally:
        sys.setprofile(None)
    assert ignored == [KeyboardInterrupt]
    assert bridge.depthwise_conv2d(*tensors).shape == (1, 3, 3, 3)
