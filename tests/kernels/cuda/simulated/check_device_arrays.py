"""The array API on arrays that lie on a card, in the simulator: the same kind out, no copy, what is bad is named."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastsepconv
from fastsepconv import activations
from fastsepconv.kernels.cuda import launch
from tests.card_arrays import DLPackArray, InterfaceArray
from tests.tolerances import ACTIVATION_UNITS, ROUNDING_UNIT, assert_close

KINDS = {"interface": InterfaceArray, "dlpack": DLPackArray}
DTYPES = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": ml_dtypes.bfloat16}
ORDERS = ("depthwise_pointwise", "pointwise_depthwise")
OPTIONS = {"padding": "same", "strides": (1, 2)}


def arrays_of(rng, dtype, order="depthwise_pointwise", data_format="channels_last"):
    channels = 3 if order == "depthwise_pointwise" else 4
    x = rng.normal(size=(2, 5, 6, 3)).astype(DTYPES[dtype])
    if data_format == "channels_first":
        x = x.transpose(0, 3, 1, 2)  # channels-last in memory, as a card's libraries keep it
    return {
        "x": x,
        "depthwise_kernel": rng.normal(size=(3, 2, channels, 2)).astype(DTYPES[dtype]),
        "pointwise_kernel": rng.normal(size=(1, 1, 6 if channels == 3 else 3, 4)).astype(DTYPES[dtype]),
    }


def reference(function, arrays, *more, **options):
    doubles = [array.astype("f8") for array in (*arrays.values(), *more)]
    return function(*doubles, backend="reference", **options)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_the_reference_and_of_the_same_kind(kind, dtype, order, data_format, rng):
    if (kind, dtype) == ("interface", "bfloat16"):
        kind = "dlpack"  # the interface has no name for it
    arrays, make = arrays_of(rng, dtype, order, data_format), KINDS[kind]
    options = OPTIONS | {"order": order, "data_format": data_format}
    on_card = [make(array) for array in arrays.values()]
    y = fastsepconv.separable_conv2d(*on_card, activation="relu6", **options)
    assert type(y) is make
    assert_close("y", y.array, reference(fastsepconv.separable_conv2d, arrays, activation="relu6", **options))
    dy = rng.normal(size=y.shape)
    dy = (dy if data_format == "channels_last" else dy.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)).astype(
        y.dtype
    )
    found = fastsepconv.separable_conv2d_grad(*on_card, make(dy), backend="cuda", **options)
    true = reference(fastsepconv.separable_conv2d_grad, arrays, dy, **options)
    for name, gradient, expected in zip((*arrays, "bias"), found, true, strict=True):
        assert type(gradient) is make and gradient.dtype == y.dtype
        assert_close(name, gradient.array, expected)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_out_is_written_where_it_is(data_format, rng):
    arrays = arrays_of(rng, "float32", data_format=data_format)
    expected = reference(fastsepconv.separable_conv2d, arrays, data_format=data_format)
    out = np.full(expected.shape, np.nan, "f4")
    if data_format == "channels_first":
        out = np.full((2, 3, 5, 4), np.nan, "f4").transpose(0, 3, 1, 2)
    given = InterfaceArray(out)
    on_card = [InterfaceArray(array) for array in arrays.values()]
    assert fastsepconv.separable_conv2d(*on_card, data_format=data_format, out=given) is given
    assert_close("out", out, expected)


def test_a_function_of_the_library_can_be_the_activation(rng):
    arrays = arrays_of(rng, "float32")
    on_card = [InterfaceArray(array) for array in arrays.values()]
    y = fastsepconv.separable_conv2d(*on_card, activation=lambda y: InterfaceArray(np.sin(y.array)))
    assert_close("y", y.array, np.sin(reference(fastsepconv.separable_conv2d, arrays)))


VALUES = np.concatenate(
    [np.linspace(-9, 9, 13), [-3, -1, -0.5, 0.5, 1, 3], [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e4, -1e4, 90, -104, 1e15]]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", activations.FUNCTIONS)
def test_every_activation_has_its_name_on_a_card_too(name, dtype):
    """Within some units of rounding of the formula in float64; halves are rounded once, after it."""
    with np.errstate(all="ignore"):
        values = VALUES.astype(DTYPES[dtype])
        exact = activations.FUNCTIONS[name](values.astype("f8")).astype("f4" if dtype != "float64" else "f8")
        exact = exact.astype(values.dtype).astype("f8")
    one, out = DLPackArray(np.ones((1, 1), values.dtype)), DLPackArray(np.full((1, 1, len(values), 1), 7, values.dtype))
    x = DLPackArray(values.reshape(1, 1, -1, 1))
    y = fastsepconv.pointwise_conv2d(x, one, activation=name)
    assert fastsepconv.pointwise_conv2d(x, one, activation=name, out=out) is out
    np.testing.assert_array_equal(out.array.astype("f8"), y.array.astype("f8"))
    ours, inputs, finite = y.array.ravel().astype("f8"), values.astype("f8"), np.isfinite(exact)
    np.testing.assert_array_equal(ours[~finite], exact[~finite])
    inputs = np.where(np.isfinite(inputs), np.abs(inputs), 1)
    allowed = ROUNDING_UNIT[dtype] * np.maximum(np.maximum(1, inputs), np.abs(exact))
    if dtype in ("float32", "float64"):
        allowed *= ACTIVATION_UNITS
    assert (np.abs(ours[finite] - exact[finite]) <= allowed[finite]).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_separable_convolution_of_halves_is_rounded_after_its_activation(dtype, order, rng):
    arrays, options = arrays_of(rng, dtype, order), OPTIONS | {"order": order, "activation": "gelu"}
    y = fastsepconv.separable_conv2d(*(DLPackArray(array) for array in arrays.values()), **options)
    assert_close("y", y.array, reference(fastsepconv.separable_conv2d, arrays, **options))


def test_an_empty_batch():
    x, kernel = InterfaceArray(np.empty((0, 3, 3, 2), "f4")), InterfaceArray(np.ones((2, 2, 2, 1), "f4"))
    y = fastsepconv.depthwise_conv2d(x, kernel)
    assert y.shape == (0, 2, 2, 2)
    dx, d_kernel, d_bias = fastsepconv.depthwise_conv2d_grad(x, kernel, y)
    assert dx.shape == (0, 3, 3, 2) and not d_kernel.array.any() and not d_bias.array.any()


X, KERNEL = np.ones((1, 4, 4, 2), "f4"), np.ones((2, 3), "f4")
BAD = {
    "other memory order": (np.asfortranarray(np.ones((2, 4, 4, 2), "f4")), KERNEL, {}, r"`x`\. Expected.*contiguous"),
    "every second": (np.ones((1, 8, 4, 2), "f4")[:, ::2], KERNEL, {}, r"`x`\. Expected.*contiguous"),
    "channels first in memory": (np.ones((1, 2, 4, 4), "f4"), KERNEL, {"data_format": "channels_first"}, "contiguous"),
    "rank": (np.ones((4, 4, 2), "f4"), KERNEL, {}, r"`x`\. Expected an array of rank 4"),
    "channels": (X, np.ones((3, 3), "f4"), {}, r"`pointwise_kernel`\. Expected 2 at axis 0"),
    "bias": (X, KERNEL, {"bias": InterfaceArray(np.ones(2, "f4"))}, r"`bias`\. Expected an array of shape \(3,\)"),
    "activation": (X, KERNEL, {"activation": "gleu"}, r"`activation`\. Expected None, a function of an array, or the"),
    "a function and out": (
        X, KERNEL, {"activation": abs, "out": InterfaceArray(np.ones((1, 4, 4, 3)))}, "`activation`.*without `out`",
    ),
    "out's memory": (X, KERNEL, {"out": np.ones((1, 4, 4, 3), "f4")}, r"`out`\. Expected an array on a card"),
    "out's shape": (X, KERNEL, {"out": InterfaceArray(np.ones((1, 4, 4, 2), "f4"))}, r"`out`\. Expected.*\(1, 4, 4, 3"),
    "out's dtype": (X, KERNEL, {"out": InterfaceArray(np.ones((1, 4, 4, 3)))}, r"`out`\. Expected the dtype of `x`"),
    "out read-only": (
        X, KERNEL, {"out": InterfaceArray(np.ones((1, 4, 4, 3), "f4"), read_only=True)}, r"`out`.*a writable array",
    ),
    "out spread": (
        X, KERNEL, {"out": InterfaceArray(np.ones((1, 4, 4, 6), "f4")[..., ::2])}, r"`out`\. Expected.*contiguous",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_used_is_named(case):
    x, kernel, options, message = case
    with pytest.raises(
        (ValueError, TypeError), match=f"Invalid value for argument {message}" if "`" in message else message
    ):
        fastsepconv.pointwise_conv2d(InterfaceArray(x), InterfaceArray(kernel), **options)


def test_out_may_not_overlap_what_is_read():
    memory = np.ones(64, "f4")
    x, out = InterfaceArray(memory[:32].reshape(1, 4, 4, 2)), InterfaceArray(memory[16:48].reshape(1, 4, 4, 2))
    with pytest.raises(ValueError, match=r"argument `out`\. Expected memory apart from that of `x`"):
        fastsepconv.pointwise_conv2d(x, InterfaceArray(np.ones((2, 2), "f4")), out=out)


def test_every_kernel_that_ran_here_is_in_the_table_of_those_that_assemble(rng):
    """By now all mixtures of elements that the array API can ask for have been made."""
    for dtype in DTYPES:
        for order in ORDERS:
            arrays = [DLPackArray(array) for array in arrays_of(rng, dtype, order).values()]
            y = fastsepconv.separable_conv2d(*arrays, order=order)
            fastsepconv.separable_conv2d_grad(*arrays, y, order=order)
        x, kernel, matrix = (
            DLPackArray(np.ones(shape, DTYPES[dtype])) for shape in ((1, 2, 2, 3), (2, 2, 3, 1), (3, 2))
        )
        fastsepconv.depthwise_conv2d_grad(x, kernel, fastsepconv.depthwise_conv2d(x, kernel))
        fastsepconv.pointwise_conv2d_grad(x, matrix, fastsepconv.pointwise_conv2d(x, matrix))
    assembled = json.loads((Path(__file__).parents[1] / "assembly.json").read_text())
    assert set(launch.KERNELS) == set(assembled)
