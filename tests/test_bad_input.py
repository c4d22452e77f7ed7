"""What cannot be used is refused in one sentence form that names the argument; nothing crashes."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import fastsepconv

F32 = np.float32


class OnDevice:
    """An array of some GPU library."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (1, 5, 5, 2), "typestr": "<f4", "data": (0, False), "version": 3}


def arguments(**changed):
    """A call of separable_conv2d that works, but for what is changed."""
    return {
        "x": np.ones((1, 5, 5, 2), F32),
        "depthwise_kernel": np.ones((3, 3, 2, 2), F32),
        "pointwise_kernel": np.ones((1, 1, 4, 3), F32),
        "bias": np.ones(3, F32),
    } | changed


def refused(argument, function, /, *args, error=ValueError, says="", **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    pattern = rf"Invalid value for argument `{argument}`\. Expected .+\. Received: {argument}.*"
    assert re.fullmatch(pattern, message, re.DOTALL), message
    assert says in message


def huge(*shape):
    """An array of that shape which takes four bytes."""
    return np.broadcast_to(F32(1), shape)


NOT_ARRAYS = {
    "object": np.ones((1, 5, 5, 2), object),
    "strings": np.full((1, 5, 5, 2), "1.0"),
    "bytes": np.full((1, 5, 5, 2), b"1"),
    "integers": np.ones((1, 5, 5, 2), np.int32),
    "pixels": np.ones((1, 5, 5, 2), np.uint8),
    "booleans": np.ones((1, 5, 5, 2), bool),
    "complex": np.ones((1, 5, 5, 2), np.complex64),
    "long double": np.ones((1, 5, 5, 2), np.longdouble),
    "dates": np.ones((1, 5, 5, 2), "datetime64[s]"),
    "records": np.ones((1, 5, 5, 2), [("value", "f4")]),
    "float8": np.ones((1, 5, 5, 2), ml_dtypes.float8_e4m3fn),
    "None": None,
    "text": "x",
    "ragged": [[1.0, 2.0], [3.0]],
    "a generator": (i for i in range(3)),
    "a dict": {"x": 1},
    "on a device": OnDevice(),
}


@pytest.mark.parametrize("value", NOT_ARRAYS.values(), ids=NOT_ARRAYS.keys())
@pytest.mark.parametrize("name", ["x", "depthwise_kernel", "pointwise_kernel", "bias"])
def test_what_is_no_array_of_floats_is_a_type_error(name, value):
    if name == "bias" and value is None:
        return
    refused(name, fastsepconv.separable_conv2d, **arguments(**{name: value}), error=TypeError)


SHAPES = {
    "x": [(), (5,), (5, 5, 2), (1, 5, 5, 2, 1), (1, 0, 5, 2), (1, 5, 0, 2), (1, 5, 5, 0)],
    "depthwise_kernel": [
        *[(), (3, 3, 2), (1, 3, 3, 2, 2), (3, 3, 3, 2), (3, 3, 1, 2), (0, 3, 2, 2), (3, 3, 0, 2), (3, 3, 2, 0)],
        *[(6, 3, 2, 2), (3, 6, 2, 2)],
    ],
    "pointwise_kernel": [
        *[(), (4,), (1, 4, 3), (1, 1, 1, 4, 3), (3, 3), (1, 1, 2, 3), (2, 1, 4, 3), (1, 3, 4, 3)],
        *[(4, 0), (0, 3), (1, 1, 4, 0), (0, 1, 4, 3)],
    ],
    "bias": [(), (1,), (4,), (0,), (1, 3), (1, 1, 1, 3)],
}


@pytest.mark.parametrize("name, shape", [(name, shape) for name, shapes in SHAPES.items() for shape in shapes], ids=str)
def test_wrong_ranks_and_sizes_are_refused(name, shape):
    call = arguments(**{name: np.ones(shape, F32)})
    refused(name, fastsepconv.separable_conv2d, **call, says=str(shape))


def test_another_number_of_channels_is_the_kernels_fault():
    refused("depthwise_kernel", fastsepconv.separable_conv2d, **arguments(x=np.ones((1, 5, 5, 3), F32)))
    x = np.ones((1, 5, 5, 2), F32)
    refused("depthwise_kernel", fastsepconv.depthwise_conv2d, x, np.ones((3, 3, 1, 1), F32))
    refused("pointwise_kernel", fastsepconv.pointwise_conv2d, x, np.ones((3, 4), F32))
    first = {"data_format": "channels_first"}
    refused("depthwise_kernel", fastsepconv.depthwise_conv2d, x, np.ones((3, 2, 2, 1), F32), **first)


def test_in_the_other_order_the_kernels_have_to_fit_in_that_order():
    call = arguments(order="pointwise_depthwise", depthwise_kernel=np.ones((3, 3, 3, 2), F32), bias=None)
    refused("pointwise_kernel", fastsepconv.separable_conv2d, **call)
    call["pointwise_kernel"] = np.ones((2, 3), F32)
    assert fastsepconv.separable_conv2d(**call).shape == (1, 3, 3, 6)
    refused("bias", fastsepconv.separable_conv2d, **call | {"bias": np.ones(3, F32)})
    refused("depthwise_kernel", fastsepconv.separable_conv2d, **call | {"depthwise_kernel": np.ones((3, 3, 2, 1), F32)})


NOT_PAIRS = [
    *[0, -1, 1.0, 1.5, 1j, "1", "11", None, True, np.float32(1), [], {}, 2**31, 2**63, 2**200],
    *[(1,), (1, 2, 3), (0, 1), (1, -1), (1, 1.0), (1, None), (1, True), (1, 2**31), ((1, 1), (1, 1))],
    *[np.ones(2), np.ones((2, 2), int)],
]


@pytest.mark.parametrize("value", NOT_PAIRS, ids=repr)
@pytest.mark.parametrize("name", ["strides", "dilation_rate"])
def test_strides_and_dilation_are_positive_integers(name, value):
    refused(name, fastsepconv.separable_conv2d, **arguments(**{name: value}))
    call = arguments(dy=np.ones((1, 3, 3, 3), F32), **{name: value})
    del call["bias"]
    refused(name, fastsepconv.separable_conv2d_grad, **call)


@pytest.mark.parametrize("value", [2, (2, 2), [2, 2], np.int8(2), np.array([2, 2]), np.array(2)], ids=repr)
def test_strides_may_be_any_kind_of_integers(value):
    assert fastsepconv.separable_conv2d(**arguments(strides=value)).shape == (1, 2, 2, 3)


NOT_PADDINGS = [
    *["", "full", "causal", "11", None, 0, 1, {}, np.ones((2, 2))],
    *[(1, 1), ((1, 1),), ((1, 1), (1, 1), (1, 1)), ((1, 1), (1,)), ((1, 1), "11"), ((1, 1), (1.0, 1))],
    *[((1, -1), (0, 0)), ((0, 0), (0, True)), ((2**31, 0), (0, 0))],
]


@pytest.mark.parametrize("value", NOT_PADDINGS, ids=repr)
def test_padding_is_a_known_name_or_two_pairs(value):
    refused("padding", fastsepconv.separable_conv2d, **arguments(padding=value))


@pytest.mark.parametrize("value", ["SAME", "Same", [[1, 1], [1, 1]], np.ones((2, 2), int)], ids=repr)
def test_padding_in_any_case_or_sequence(value):
    assert fastsepconv.separable_conv2d(**arguments(padding=value)).shape == (1, 5, 5, 3)


@pytest.mark.parametrize("name", ["data_format", "order", "backend"])
@pytest.mark.parametrize("value", ["NHWC", "", 1, b"cpu", ("cpu",), np.array(["cpu", "cpu"])], ids=repr)
def test_names_have_to_be_known(name, value):
    refused(name, fastsepconv.separable_conv2d, **arguments(**{name: value}))


OUTS = {
    "a list": ([[0.0]], TypeError),
    "another dtype": (np.empty((1, 3, 3, 3), np.float64), TypeError),
    "byte-swapped": (np.empty((1, 3, 3, 3), np.dtype(F32).newbyteorder()), TypeError),
    "another shape": (np.empty((1, 3, 3, 4), F32), ValueError),
    "another rank": (np.empty((3, 3, 3), F32), ValueError),
    "one that would broadcast": (np.empty((2, 1, 3, 3, 3), F32), ValueError),
    "read-only": (np.broadcast_to(F32(0), (1, 3, 3, 3)), ValueError),
    "one place for all elements": (as_strided(np.zeros(1, F32), (1, 3, 3, 3), (0, 0, 0, 0)), ValueError),
    "rows that share elements": (as_strided(np.zeros(64, F32), (1, 3, 3, 3), (0, 12, 12, 4)), ValueError),
}


@pytest.mark.parametrize("out, error", OUTS.values(), ids=OUTS.keys())
def test_out_has_to_be_what_the_result_is(out, error):
    refused("out", fastsepconv.separable_conv2d, **arguments(out=out), error=error)


def test_out_is_in_the_data_format():
    x = np.ones((1, 2, 5, 5), F32)
    call = arguments(x=x, data_format="channels_first", padding="same", out=np.empty((1, 5, 5, 3), F32))
    refused("out", fastsepconv.separable_conv2d, **call, says="(1, 3, 5, 5)")


@pytest.mark.parametrize("shape", [(), (1, 3, 3), (1, 3, 3, 2), (1, 2, 3, 3), (2, 3, 3, 3), (0, 3, 3, 3), (1, 1, 1, 3)])
def test_dy_has_the_shape_of_the_output(shape):
    call = arguments(dy=np.ones(shape, F32))
    del call["bias"]
    refused("dy", fastsepconv.separable_conv2d_grad, **call)


def test_dy_is_in_the_data_format():
    x, kernel = np.ones((1, 2, 5, 6), F32), np.ones((3, 3, 2, 1), F32)
    wrong = np.ones((1, 3, 4, 2), F32)
    gradient = fastsepconv.depthwise_conv2d_grad
    refused("dy", gradient, x, kernel, wrong, data_format="channels_first", says="(1, 2, 3, 4)")


def test_a_kernel_larger_than_the_padded_image_is_refused_as_by_the_keras_layer():
    call = arguments(depthwise_kernel=np.ones((3, 3, 2, 2), F32))
    assert fastsepconv.separable_conv2d(**call, dilation_rate=2).shape == (1, 1, 1, 3)
    refused("depthwise_kernel", fastsepconv.separable_conv2d, **call, dilation_rate=3, says="spans 7x7")
    refused("depthwise_kernel", fastsepconv.separable_conv2d, **call, dilation_rate=3, padding=((1, 0), (2, 0)))
    assert fastsepconv.separable_conv2d(**call, dilation_rate=3, padding=((1, 1), (2, 0))).shape == (1, 1, 1, 3)


HUGE = {
    "x": ("depthwise", huge(1, 2**29, 2**30, 2), np.ones((3, 3, 2, 1), F32)),
    "depthwise_kernel": ("depthwise", np.ones((1, 5, 5, 2), F32), huge(3, 3, 2, 2**55)),
    "pointwise_kernel": ("pointwise", np.ones((1, 1, 1, 2), F32), huge(2, 2**59)),
}


@pytest.mark.parametrize("name", HUGE)
def test_an_array_that_cannot_be_copied_into_memory_is_refused(backend, name):
    operation, *arrays = HUGE[name]
    forward, gradient = (getattr(fastsepconv, f"{operation}_conv2d{suffix}") for suffix in ("", "_grad"))
    refused(name, forward, *arrays, backend=backend, says="memory")
    refused("dy", gradient, *arrays, np.ones((1, 3, 3, 2), F32), backend=backend)


@pytest.mark.parametrize(
    "changed",
    [
        {"padding": ((2**31 - 1,) * 2, (2**31 - 1,) * 2)},
        {"padding": ((0, 2**31 - 1), (0, 2**31 - 1)), "strides": 1, "dilation_rate": 2**29},
        {"x": huge(2**10, 5, 5, 2), "padding": ((0, 2**31 - 1), (0, 2**31 - 1))},
        {"x": huge(0, 2**29, 2**29, 2), "padding": ((2**29, 2**29), (2**29, 2**29))},
    ],
)
def test_an_output_beyond_64_bits_or_memory_is_refused(backend, changed):
    refused("x", fastsepconv.separable_conv2d, **arguments(**changed), backend=backend, says="fit in memory")


def test_a_kernel_that_spans_more_than_31_bits_is_refused():
    refused("dilation_rate", fastsepconv.separable_conv2d, **arguments(padding="same", dilation_rate=2**30))


@pytest.mark.parametrize("padding", ["same", ((2**29, 2**29), (2**29, 2**29))], ids=str)
def test_huge_strides_and_dilation_that_make_sense_are_right(backend, padding):
    call = arguments(strides=2**31 - 1, dilation_rate=2**29, padding=padding)
    expected = 2 * 2 * 1.0 + 1  # the middle tap alone, both channels, both multipliers, and the bias
    y = fastsepconv.separable_conv2d(**call, backend=backend)
    assert y.shape == (1, 1, 1, 3)
    np.testing.assert_array_equal(y, expected)
    del call["bias"]
    dx, *_ = fastsepconv.separable_conv2d_grad(**call, dy=np.ones_like(y), backend=backend)
    pixel = (2, 2) if padding == "same" else (0, 0)
    assert dx[0, *pixel].tolist() == [6, 6]
    assert np.count_nonzero(dx) == 2


def test_unknown_and_missing_arguments_are_pythons_own_errors():
    with pytest.raises(TypeError, match="unexpected keyword"):
        fastsepconv.separable_conv2d(**arguments(stride=1))
    with pytest.raises(TypeError, match="positional"):
        fastsepconv.depthwise_conv2d(*arguments().values())
