"""Every operation and pass of the plain kernels, on every element, against the float64 reference."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest

from fastsepconv.kernels import cuda, nvidia, reference
from fastsepconv.kernels.cuda import launch, sums
from fastsepconv.kernels.geometry import Geometry, resolve
from tests.tolerances import RELATIVE, assert_close, relative_error

OPERATIONS = ("depthwise", "pointwise", "separable")
DTYPES = {
    "float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip
# (image N,H,W,C), (taps R,S), multiplier, filters, (strides, padding, dilation). Ragged on purpose.
CASES = {
    "plain": ((2, 6, 5, 3), (3, 3), 1, 4, ((1, 1), "valid", (1, 1))),
    "same, multiplier": ((2, 5, 4, 2), (3, 2), 2, 3, ((1, 1), "same", (1, 1))),
    "unequal strides": ((1, 7, 8, 3), (3, 3), 1, 2, ((2, 3), "same", (1, 1))),
    "dilation": ((1, 7, 6, 2), (3, 2), 2, 3, ((1, 1), "same", (2, 3))),
    "strides and dilation": ((2, 9, 7, 2), (2, 3), 1, 3, ((2, 1), "valid", (3, 2))),
    "explicit padding": ((1, 4, 3, 2), (2, 3), 1, 3, ((1, 2), ((2, 0), (1, 3)), (1, 1))),
    "padding beyond the kernel": ((1, 2, 3, 2), (2, 2), 1, 3, ((1, 1), ((4, 0), (0, 5)), (1, 1))),
    "kernel beyond the image": ((1, 3, 2, 2), (5, 4), 3, 2, ((1, 1), "same", (1, 1))),
    "one of everything": ((1, 1, 1, 1), (1, 1), 1, 1, ((1, 1), "valid", (1, 1))),
    "many channels": ((1, 2, 2, 67), (2, 2), 1, 33, ((1, 1), "same", (1, 1))),
    "empty batch": ((0, 4, 4, 3), (3, 3), 2, 2, ((1, 1), "same", (1, 1))),
}


def window_of(case) -> tuple[Geometry, int]:
    image, taps, multiplier, filters, window = case
    return resolve(image, (*taps, image[3], multiplier), *window), filters


def operands(operation: str, g: Geometry, filters: int, dtype, rng) -> tuple[list[np.ndarray], tuple, np.ndarray]:
    """[x, the kernels, the bias], what comes before them, and dy."""
    middle = g.channels * (1 if operation == "pointwise" else g.multiplier)
    shapes = {
        "depthwise": [g.input_shape, g.kernel_shape, (middle,)],
        "pointwise": [(g.batch * g.height * g.width, middle), (middle, filters), (filters,)],
        "separable": [g.input_shape, g.kernel_shape, (middle, filters), (filters,)],
    }[operation]
    out = {
        "depthwise": g.output_shape,
        "pointwise": (shapes[0][0], filters),
        "separable": (*g.output_shape[:3], filters),
    }[operation]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in (*shapes, out)]
    return arrays[:-1], () if operation == "pointwise" else (g,), arrays[-1]


def compute(operation: str, before: tuple, inputs: list, dy) -> list[np.ndarray]:
    """[y, the gradient of each input], written over NaN."""
    y = np.full(dy.shape, np.nan, dy.dtype)
    getattr(cuda, f"{operation}_forward")(*before, *inputs, y)
    gradients = [np.full(array.shape, np.nan, array.dtype) for array in inputs]
    getattr(cuda, f"{operation}_backward")(*before, *inputs[:-1], dy, *gradients)
    return [y, *gradients]


def exact(operation: str, before: tuple, inputs: list, dy) -> list[np.ndarray]:
    *doubles, dy = (array.astype(np.float64) for array in (*inputs, dy))
    y = getattr(reference, f"{operation}_forward")(*before, *doubles)
    return [y, *getattr(reference, f"{operation}_backward")(*before, *doubles[:-1], dy)]


def test_this_is_the_simulator():
    assert nvidia.is_simulated() and nvidia.obstacle() is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_pass_is_the_reference(case, operation, dtype, rng):
    g, filters = window_of(case)
    inputs, before, dy = operands(operation, g, filters, DTYPES[dtype], rng)
    results = compute(operation, before, inputs, dy)
    names = ["y", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, result, true in zip(names, results, exact(operation, before, inputs, dy), strict=True):
        assert result.dtype == DTYPES[dtype]
        assert_close(f"{operation} {name}", result, true)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_what_is_wanted_is_computed(operation, rng):
    g, filters = window_of(CASES["same, multiplier"])
    inputs, before, dy = operands(operation, g, filters, np.float32, rng)
    _, *everything = compute(operation, before, inputs, dy)
    ran = []
    launch.listeners.append(ran.append)
    for wanted, gradient in enumerate(everything):
        alone = [np.full_like(array, np.nan) if i == wanted else None for i, array in enumerate(inputs)]
        ran.clear()
        getattr(cuda, f"{operation}_backward")(*before, *inputs[:-1], dy, *alone)
        np.testing.assert_array_equal(alone[wanted], gradient)
        assert len(ran) <= {"depthwise": 2, "pointwise": 2, "separable": 3}[operation]
    launch.listeners.remove(ran.append)


@pytest.mark.parametrize("clamp", [(0, np.inf), (0, 6), (-1, 1)], ids=["relu", "relu6", "hard_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_clamps_and_keeps_nan(operation, dtype, clamp, rng):
    g, filters = window_of(CASES["plain"])
    inputs, before, dy = operands(operation, g, filters, DTYPES[dtype], rng)
    inputs[0] *= 3
    inputs[0].flat[4] = np.nan
    y, free = np.full((2, *dy.shape), 7, DTYPES[dtype])
    getattr(cuda, f"{operation}_forward")(*before, *inputs, free)
    getattr(cuda, f"{operation}_forward")(*before, *inputs, y, clamp)
    assert np.isnan(free).any() and not np.isnan(free).all()
    np.testing.assert_array_equal(y.astype(np.float64), np.clip(free.astype(np.float64), *clamp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["depthwise", "separable"])
def test_a_relu_of_x_first(operation, dtype, rng):
    g, filters = window_of(CASES["strides and dilation"])
    inputs, before, dy = operands(operation, g, filters, DTYPES[dtype], rng)
    inputs[0].flat[4] = np.nan
    with np.errstate(invalid="ignore"):
        above = np.where(inputs[0] < 0, DTYPES[dtype](0), inputs[0])
    y, expected = np.full((2, *dy.shape), 7, DTYPES[dtype])
    getattr(cuda, f"{operation}_forward")(*before, *inputs, y, relu_x=True)
    getattr(cuda, f"{operation}_forward")(*before, above, *inputs[1:], expected)
    assert np.isnan(y).any() and not np.isnan(y).all()
    np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_not_finite_goes_through(operation, dtype, value, rng):
    g, filters = window_of(CASES["strides and dilation"])
    inputs, before, dy = operands(operation, g, filters, DTYPES[dtype], rng)
    inputs[0].flat[0] = value
    dy.flat[0] = value
    with np.errstate(invalid="ignore"):
        true = exact(operation, before, inputs, dy)
    for i, (result, expected) in enumerate(zip(compute(operation, before, inputs, dy), true, strict=True)):
        assert not np.isfinite(expected).all(), "the value has to reach every result"
        assert_close(f"{operation} {i}", result, expected)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_halves_are_rounded_as_numpy_rounds_them(half):
    """Many words of a half, and of the float32 values between two of them, through a convolution that changes none.

    Half of the values that lie in the middle between two words are rounded up, the others down: to the even word.
    """
    dtype = DTYPES[half]
    words = np.arange(0, 2**16 - 1, 7, dtype=np.uint16)
    values, following = (each.view(dtype).astype(np.float32) for each in (words, words + np.uint16(1)))
    with np.errstate(all="ignore"):
        middle = values + (following - values) / 2
        beside = [values * np.float32(1 + 2**-9), np.nextafter(middle, values), np.nextafter(middle, following)]
        values = np.concatenate([values, middle, *beside])
    one, y = np.ones((1, 1), np.float32), np.zeros((len(values), 1), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.pointwise_forward(values[:, None], one, None, y)
        with np.errstate(all="ignore"):
            expected = values.astype(dtype)
    np.testing.assert_array_equal(np.isnan(y[:, 0]), np.isnan(expected))
    np.testing.assert_array_equal(y[~np.isnan(y)], expected[~np.isnan(expected)])


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 3), (1000, 2), (5000, 1), (3000, 500000)])
def test_sums_are_split_so_that_every_row_is_summed_once(rows, columns):
    parts, length, run = sums.split(rows, columns)
    assert (parts - 1) * length < rows <= parts * length
    assert 1 <= run <= length
    assert parts == 1 or parts * columns <= sums.ENOUGH_THREADS


def test_long_sums_stay_exact(rng):
    """Sums over many rows are no worse in float32 than the tolerance of short ones, and the same at every call."""
    rows = 6000
    x, kernel, dy = (rng.random(shape, np.float32) + 1 for shape in ((rows, 1), (1, 1), (rows, 1)))
    runs = []
    for _ in range(2):
        gradients = [np.full(array.shape, np.nan, np.float32) for array in (x, kernel, np.ones(1))]
        cuda.pointwise_backward(x, kernel, dy, *gradients)
        runs.append(gradients)
    for ours, again, true in zip(*runs, reference.pointwise_backward(x, kernel, dy), strict=True):
        np.testing.assert_array_equal(ours, again)
        assert relative_error(ours, true) <= RELATIVE["float32"] / 20


def test_concurrent_calls_take_turns(rng):
    from concurrent.futures import ThreadPoolExecutor

    x, kernel = rng.standard_normal((5, 4), np.float32), rng.standard_normal((4, 3), np.float32)

    def call(_):
        y = np.full((5, 3), np.nan, np.float32)
        cuda.pointwise_forward(x, kernel, None, y)
        return y

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(call, range(12)):
            assert_close("y", y, reference.pointwise_forward(x, kernel))
