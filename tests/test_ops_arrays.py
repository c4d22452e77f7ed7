"""Which arrays the functions take and give: dtypes, memory orders, data formats, `out=`."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import fastsepconv
from fastsepconv.kernels import cpu

from .tolerances import assert_close

HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
OPTIONS = {"padding": "same", "strides": (1, 2)}


@pytest.fixture
def arrays(rng):
    return {
        "x": rng.normal(size=(2, 6, 7, 5)).astype("float32"),
        "depthwise_kernel": rng.normal(size=(3, 2, 5, 2)).astype("float32"),
        "pointwise_kernel": rng.normal(size=(1, 1, 10, 4)).astype("float32"),
        "bias": rng.normal(size=4).astype("float32"),
    }


def forward(arrays, **options):
    return fastsepconv.separable_conv2d(**arrays, **OPTIONS | options)


def backward(arrays, dy, **options):
    kernels = {name: array for name, array in arrays.items() if name != "bias"}
    return fastsepconv.separable_conv2d_grad(**kernels, dy=dy, **OPTIONS | options)


def in_float64(arrays):
    return {name: np.asarray(array, "float64") for name, array in arrays.items()}


@pytest.mark.parametrize("half", HALF.values(), ids=HALF.keys())
@pytest.mark.parametrize("activation", [None, "relu6", "gelu"])
def test_half_types_are_computed_in_float32_and_rounded(arrays, backend, half, activation):
    """Once; where a CPU multiplies bfloat16, between the two steps as well: an error of what relu6 then cuts off."""
    arrays = {name: array.astype(half) for name, array in arrays.items()}
    y = forward(arrays, backend=backend, activation=activation)
    assert y.dtype == half
    roundings = 2 if backend == "cpu" and half is HALF["bfloat16"] and cpu.FORWARD_HALVES else 1
    assert_close("y", y, forward(in_float64(arrays), backend="reference", activation=activation), roundings)
    exact = backward(in_float64(arrays), y.astype("float64"), backend="reference")
    for name, ours, truth in zip((*arrays, "bias"), backward(arrays, y, backend=backend), exact, strict=False):
        assert ours.dtype == half
        assert_close(name, ours, truth)


def test_what_does_not_fit_in_a_half_becomes_infinite_without_a_warning(backend):
    x = np.full((1, 2, 2, 1), 60000, np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = fastsepconv.depthwise_conv2d(x, np.ones((2, 2, 1, 1), np.float16), backend=backend)
    assert np.isposinf(y).all()


@pytest.mark.parametrize(
    "x, kernel, result",
    [
        ("float32", "float64", "float64"),
        ("float64", "float16", "float64"),
        ("float16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float64", "float64"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_unlike_dtypes_are_promoted_and_gradients_take_their_own(rng, backend, x, kernel, result):
    x = rng.normal(size=(1, 4, 4, 3)).astype(HALF.get(x, x))
    kernel = rng.normal(size=(2, 2, 3, 1)).astype(HALF.get(kernel, kernel))
    y = fastsepconv.depthwise_conv2d(x, kernel, backend=backend)
    assert y.dtype == result
    dx, d_kernel, d_bias = fastsepconv.depthwise_conv2d_grad(x, kernel, y, backend=backend)
    assert (dx.dtype, d_kernel.dtype, d_bias.dtype) == (x.dtype, kernel.dtype, y.dtype)


def test_nested_lists_are_float64(backend):
    y = fastsepconv.pointwise_conv2d([[[[1.0, 2.0]]]], [[3.0], [4.0]], backend=backend)
    assert y.dtype == "float64"
    assert y.tolist() == [[[[11.0]]]]


def spread(array):
    """Every second element of a larger array, backwards."""
    wide = np.zeros([2 * size for size in array.shape], array.dtype)
    view = wide[tuple(slice(None, None, -2) for _ in array.shape)]
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = {
    "spread and backwards": spread,
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "unaligned": unaligned,
    "byte-swapped": lambda array: array.astype(array.dtype.newbyteorder()),
    "a subclass": lambda array: array.view(np.recarray),
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_memory_order_of_the_inputs_does_not_matter(arrays, backend, lay_out):
    expected = forward(arrays, backend=backend)
    laid_out = {name: lay_out(array) for name, array in arrays.items()}
    originals = {name: array.copy() for name, array in laid_out.items()}
    y = forward(laid_out, backend=backend)
    assert type(y) is np.ndarray
    assert y.dtype == np.dtype("float32")
    assert y.dtype.isnative
    np.testing.assert_array_equal(y, expected)
    gradients = backward(laid_out, lay_out(expected), backend=backend)
    for ours, plain in zip(gradients, backward(arrays, expected, backend=backend), strict=True):
        assert ours.dtype.isnative
        np.testing.assert_array_equal(ours, plain)
    for name, array in laid_out.items():
        np.testing.assert_array_equal(array, originals[name], err_msg=f"{name} was changed")


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
def test_channels_first_is_the_same_transposed(rng, backend, order):
    middle = 5 if order == "depthwise_pointwise" else 4
    x = rng.normal(size=(2, 6, 7, 5))
    depthwise = rng.normal(size=(3, 2, middle, 2))
    pointwise = rng.normal(size=(10 if order == "depthwise_pointwise" else 5, 4))
    options = OPTIONS | {"order": order, "backend": backend}
    y = fastsepconv.separable_conv2d(x, depthwise, pointwise, **options)
    gradients = fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, y, **options)
    options["data_format"] = "channels_first"
    x, dy = x.transpose(0, 3, 1, 2), y.transpose(0, 3, 1, 2)
    y_first = fastsepconv.separable_conv2d(x, depthwise, pointwise, **options)
    assert y_first.flags.c_contiguous
    np.testing.assert_array_equal(y_first, dy)
    dx, *others = fastsepconv.separable_conv2d_grad(x, depthwise, pointwise, dy, **options)
    assert dx.flags.c_contiguous
    np.testing.assert_array_equal(dx, gradients[0].transpose(0, 3, 1, 2))
    for ours, plain in zip(others, gradients[1:], strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_a_pointwise_kernel_may_be_a_matrix_and_its_gradient_is_one_too(arrays, backend):
    y = forward(arrays, backend=backend)
    gradient = backward(arrays, y, backend=backend)[2]
    assert gradient.shape == (1, 1, 10, 4)
    arrays["pointwise_kernel"] = arrays["pointwise_kernel"][0, 0]
    np.testing.assert_array_equal(forward(arrays, backend=backend), y)
    np.testing.assert_array_equal(backward(arrays, y, backend=backend)[2], gradient[0, 0])


@pytest.mark.parametrize("activation", [None, "relu", "gelu", np.tanh], ids=str)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("place", ["C", "F", "spread", "unaligned", "channels last inside"])
def test_out_takes_the_result_whatever_its_memory(arrays, backend, place, dtype, data_format, activation):
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    if data_format == "channels_first":
        arrays["x"] = arrays["x"].transpose(0, 3, 1, 2)
    options = {"backend": backend, "data_format": data_format, "activation": activation}
    expected = forward(arrays, **options)
    out = np.full_like(expected, np.nan)
    if place == "F":
        out = np.asfortranarray(out)
    elif place == "channels last inside":
        out = np.full_like(expected.transpose(0, 2, 3, 1), np.nan, order="C").transpose(0, 3, 1, 2)
    elif place != "C":
        out = {"spread": spread, "unaligned": unaligned}[place](out)
    assert forward(arrays, out=out, **options) is out
    np.testing.assert_array_equal(out, expected)


def test_out_of_no_images_is_taken_too(backend):
    x, out = np.empty((0, 2, 3, 4), "float32"), np.empty((0, 2, 3, 5), "float32")
    assert fastsepconv.pointwise_conv2d(x, np.ones((4, 5), "float32"), out=out, backend=backend) is out


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_out_may_be_the_input_itself(rng, backend, activation):
    x = rng.normal(size=(2, 5, 5, 4)).astype("float32")
    depthwise, pointwise = rng.normal(size=(3, 3, 4, 1)).astype("float32"), rng.normal(size=(4, 4)).astype("float32")
    options = {"padding": "same", "activation": activation, "backend": backend}
    expected = fastsepconv.separable_conv2d(x, depthwise, pointwise, **options)
    assert fastsepconv.separable_conv2d(x, depthwise, pointwise, out=x, **options) is x
    np.testing.assert_array_equal(x, expected)


def test_out_may_overlap_an_input_in_part(rng, backend):
    memory = rng.normal(size=2 * 5 * 5 * 4 + 13).astype("float32")
    x, out = (memory[start : start + 200].reshape(2, 5, 5, 4) for start in (0, 13))
    kernel, bias = rng.normal(size=(3, 3, 4, 1)).astype("float32"), memory[-4:]
    expected = fastsepconv.depthwise_conv2d(x.copy(), kernel, bias.copy(), padding="same", backend=backend)
    fastsepconv.depthwise_conv2d(x, kernel, bias, padding="same", backend=backend, out=out)
    np.testing.assert_array_equal(out, expected)


def test_out_may_overlap_a_kernel(rng, backend):
    memory = rng.normal(size=16).astype("float32")
    x, kernel, out = rng.normal(size=(1, 2, 2, 4)).astype("float32"), memory.reshape(4, 4), memory.reshape(1, 2, 2, 4)
    expected = fastsepconv.pointwise_conv2d(x, kernel.copy(), backend=backend)
    fastsepconv.pointwise_conv2d(x, kernel, out=out, backend=backend)
    np.testing.assert_array_equal(out, expected)


def test_nothing_is_written_beside_out(rng, backend):
    x, kernel = rng.normal(size=(2, 5, 6, 13)).astype("float32"), rng.normal(size=(13, 7)).astype("float32")
    memory = np.full(2 * 5 * 6 * 7 + 64, 17, "float32")
    fastsepconv.pointwise_conv2d(x, kernel, out=memory[32:-32].reshape(2, 5, 6, 7), backend=backend)
    assert (memory[:32] == 17).all()
    assert (memory[-32:] == 17).all()


def test_several_threads_may_call_at_once(arrays, backend):
    expected = forward(arrays, backend=backend, activation="gelu")
    gradients = backward(arrays, expected, backend=backend)

    def work(_):
        y = forward(arrays, backend=backend, activation="gelu")
        return [y, *backward(arrays, y, backend=backend)]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(40)):
            for ours, alone in zip(results, [expected, *gradients], strict=True):
                np.testing.assert_array_equal(ours, alone)
