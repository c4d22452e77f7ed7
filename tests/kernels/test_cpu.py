"""The CPU kernels on bare buffers: every element written, nothing outside, any alignment, any number of threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from fastsepconv import formulas
from fastsepconv.kernels import cpu, reference
from fastsepconv.kernels.cpu import gemm, threads
from fastsepconv.kernels.geometry import Geometry, effective_size, resolve
from tests.tolerances import assert_close

GUARD = 64  # elements around a buffer that have to stay as they were
DTYPES = ("float32", "float64")
OPERATIONS = ("depthwise", "pointwise", "separable")


class Buffers:
    """Arrays whose first element stands `offset` elements past a cache line, poisoned, with poison around them."""

    def __init__(self, dtype: str, offset: int = 0):
        self.dtype, self.offset, self.taken = np.dtype(dtype), offset, []

    def output(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of NaN."""
        count = int(np.prod(shape))
        whole = np.full(count + 3 * GUARD, np.nan, self.dtype)
        to_line = -whole.ctypes.data % 64 // self.dtype.itemsize
        first = GUARD + to_line + self.offset
        self.taken.append((whole, first, first + count))
        return whole[first : first + count].reshape(shape)

    def input(self, values: np.ndarray) -> np.ndarray:
        """A copy of the values: what a kernel reads around it is NaN."""
        array = self.output(values.shape)
        array[...] = values
        return array

    def check(self) -> None:
        for whole, first, last in self.taken:
            assert np.isnan(whole[:first]).all(), "written before an array's begin"
            assert np.isnan(whole[last:]).all(), "written past an array's end"


def drawn_geometry(rng: np.random.Generator) -> Geometry:
    """Ragged sizes, any window."""
    taps, strides, dilation = (tuple(map(int, rng.integers(1, last, 2))) for last in (6, 4, 4))
    zeros = tuple(tuple(map(int, pair)) for pair in rng.integers(0, 4, (2, 2)))
    padding = ("valid", "same", zeros)[rng.integers(3)]
    spans = [effective_size(*pair) for pair in zip(taps, dilation, strict=True)]
    image = [int(rng.integers(1 if padding == "same" else span, span + 20)) for span in spans]
    batch, channels, multiplier = (int(rng.integers(*ends)) for ends in ((0, 4), (1, 80), (1, 4)))
    return resolve((batch, *image, channels), (*taps, channels, multiplier), strides, padding, dilation)


@contextlib.contextmanager
def on_threads(most: int) -> Iterator[None]:
    """While the context lasts, at most so many threads compute."""
    usual = threads.get_num_threads()
    threads.set_num_threads(min(most, usual))
    try:
        yield
    finally:
        threads.set_num_threads(usual)


def operands(operation: str, g: Geometry, filters: int, rng: np.random.Generator) -> tuple[list[np.ndarray], tuple]:
    """[x, the kernels, the bias] and the output's shape."""
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
    return [rng.standard_normal(shape) for shape in shapes], out


def compute(
    operation: str, g: Geometry, inputs: list[np.ndarray], dy: np.ndarray, buffers: Buffers
) -> list[np.ndarray]:
    """[y, dx, the kernels' gradients, d_bias], in buffers of their own."""
    window = () if operation == "pointwise" else (g,)
    y = buffers.output(dy.shape)
    getattr(cpu, f"{operation}_forward")(*window, *inputs, y)
    gradients = [buffers.output(array.shape) for array in inputs]
    getattr(cpu, f"{operation}_backward")(*window, *inputs[:-1], dy, *gradients)
    return [y, *gradients]


def expected(operation: str, g: Geometry, inputs: list[np.ndarray], dy: np.ndarray) -> list[np.ndarray]:
    window = () if operation == "pointwise" else (g,)
    y = getattr(reference, f"{operation}_forward")(*window, *inputs)
    return [y, *getattr(reference, f"{operation}_backward")(*window, *inputs[:-1], dy)]


def hold(operation: str, g: Geometry, filters: int, dtype: str, rng: np.random.Generator, offset: int = 0) -> None:
    """Runs an operation on guarded buffers and holds it against the reference."""
    values, out = operands(operation, g, filters, rng)
    buffers = Buffers(dtype, offset)
    inputs = [buffers.input(array) for array in values]
    dy = buffers.input(rng.standard_normal(out))
    results = compute(operation, g, inputs, dy, buffers)
    buffers.check()
    names = ["y", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, result, exact in zip(names, results, expected(operation, g, inputs, dy), strict=True):
        assert_close(f"{operation} {name}, {g}, {filters} filters", result, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_writes_every_element_and_nothing_else(operation, dtype, rng):
    for _ in range(60):
        hold(operation, drawn_geometry(rng), int(rng.integers(1, 90)), dtype, rng, offset=int(rng.integers(0, 16)))


@pytest.mark.parametrize("offset", [0, 1, 15])
@pytest.mark.parametrize("filters", [256, 255])
def test_writes_a_large_output_at_any_address(filters, offset, rng):
    rows = gemm.STREAMED_BYTES // (4 * filters) + 5
    values = [rng.standard_normal(shape, "float32") for shape in ((rows, 3), (3, filters), (filters,))]
    buffers = Buffers("float32", offset)
    x, kernel, bias = (buffers.input(array) for array in values)
    y = buffers.output((rows, filters))
    assert y.nbytes > gemm.STREAMED_BYTES
    cpu.pointwise_forward(x, kernel, bias, y)
    buffers.check()
    assert_close("y", y, reference.pointwise_forward(x, kernel, bias))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("channels", [80, 256, 255])  # with a part of a tile's vectors, without, not at cache lines
@pytest.mark.parametrize("operation", ["depthwise", "separable"])
def test_writes_a_large_image_at_any_address(operation, channels, offset, rng):
    """y of the depthwise convolution, and d_x of both."""
    height = gemm.STREAMED_BYTES // (4 * 160 * channels) + 1
    g = resolve((1, height, 160, channels), (3, 3, channels, 1), (1, 1), "same", (1, 1))
    hold(operation, g, 5, "float32", rng, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gives_the_same_bits_on_one_thread_and_on_two(operation, dtype, rng):
    for _ in range(15):
        g = drawn_geometry(rng)
        values, out = operands(operation, g, int(rng.integers(1, 90)), rng)
        inputs, dy = [array.astype(dtype) for array in values], rng.standard_normal(out).astype(dtype)
        runs = []
        for count in (1, 2):
            with on_threads(count):
                runs.append(compute(operation, g, inputs, dy, Buffers(dtype)))
        for one, two in zip(*runs, strict=True):
            np.testing.assert_array_equal(one, two, err_msg=str(g))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_lets_what_is_not_finite_through(operation, dtype, value, rng):
    g = resolve((2, 9, 11, 19), (3, 2, 19, 2), (2, 1), "same", (1, 2))
    values, out = operands(operation, g, 21, rng)
    inputs, dy = [array.astype(dtype) for array in values], rng.standard_normal(out).astype(dtype)
    inputs[0].flat[rng.integers(inputs[0].size)] = value
    dy.flat[rng.integers(dy.size)] = value
    results = compute(operation, g, inputs, dy, Buffers(dtype))
    with np.errstate(invalid="ignore"):
        exact = expected(operation, g, inputs, dy)
    for i, (result, true) in enumerate(zip(results, exact, strict=True)):
        assert not np.isfinite(true).all(), "the value has to reach every result"
        assert_close(f"{operation} {i}", result, true)


@pytest.mark.parametrize("clamp", [(0, np.inf), (0, 6), (-1, 1)], ids=["relu", "relu6", "hard_tanh"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_clamps_and_keeps_nan(operation, clamp, rng):
    g = resolve((1, 7, 8, 19), (3, 3, 19, 1), (1, 1), "same", (1, 1))
    values, out = operands(operation, g, 21, rng)
    inputs = [3 * array.astype("float32") for array in values]
    inputs[0].flat[5] = np.nan
    window = () if operation == "pointwise" else (g,)
    y = np.full(out, 7, "float32")
    getattr(cpu, f"{operation}_forward")(*window, *inputs, y, clamp)
    exact = getattr(reference, f"{operation}_forward")(*window, *inputs)
    assert np.isnan(exact).any()
    unclamped = np.full(out, 7, "float32")
    getattr(cpu, f"{operation}_forward")(*window, *inputs, unclamped)
    np.testing.assert_array_equal(y, np.clip(unclamped, *clamp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["depthwise", "separable"])
@pytest.mark.parametrize("backend", [cpu, formulas], ids=["cpu", "reference"])
def test_a_relu_of_x_first(backend, operation, dtype, rng):
    g = resolve((2, 7, 8, 19), (3, 3, 19, 2), (2, 1), "same", (1, 1))
    x, depthwise = (rng.standard_normal(shape).astype(dtype) for shape in (g.input_shape, g.kernel_shape))
    x.flat[0] = np.nan
    filters = g.channels * g.multiplier
    kernels = [depthwise, rng.standard_normal((filters, 7)).astype(dtype)][: 1 + (operation == "separable")]
    out = (*g.output_shape[:3], kernels[-1].shape[1] if operation == "separable" else filters)
    y, expected = np.full((2, *out), 7, dtype)
    forward = getattr(backend, f"{operation}_forward")
    forward(g, x, *kernels, None, y, relu_x=True)
    with np.errstate(invalid="ignore"):
        forward(g, np.where(x < 0, np.zeros(1, dtype), x), *kernels, None, expected)
    assert np.isnan(y).any() and not np.isnan(y).all()
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_empty_batch_has_gradients_of_zero(operation, dtype, rng):
    g = resolve((0, 9, 9, 5), (3, 3, 5, 2), (1, 1), "valid", (1, 1))
    values, out = operands(operation, g, 7, rng)
    inputs, dy = [array.astype(dtype) for array in values], np.zeros(out, dtype)
    y, dx, *weights = compute(operation, g, inputs, dy, Buffers(dtype))
    assert y.size == dx.size == 0
    assert all(np.array_equal(weight, np.zeros_like(weight)) for weight in weights)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_computes_only_the_gradients_that_are_wanted(operation, rng):
    g = resolve((2, 7, 6, 17), (3, 3, 17, 2), (1, 1), "same", (1, 1))
    values, out = operands(operation, g, 9, rng)
    inputs, dy = [array.astype("float32") for array in values], rng.standard_normal(out).astype("float32")
    _, *everything = compute(operation, g, inputs, dy, Buffers("float32"))
    window = () if operation == "pointwise" else (g,)
    for wanted, gradient in enumerate(everything):
        alone = [np.full_like(array, np.nan) if i == wanted else None for i, array in enumerate(inputs)]
        getattr(cpu, f"{operation}_backward")(*window, *inputs[:-1], dy, *alone)
        np.testing.assert_array_equal(alone[wanted], gradient)
