"""What a frozen model has the kernels compute besides: a ReLU of x, and a residual that is added to the result."""

from __future__ import annotations

import numpy as np
import pytest

from fastsepconv.kernels import reference
from fastsepconv.kernels.cpu import blocking, depthwise, gemm, packing, pointwise, separable, threads
from fastsepconv.kernels.cpu.jit import kernel
from fastsepconv.kernels.cpu.tiles import CHOSEN
from fastsepconv.kernels.geometry import resolve
from tests.targets import run_again
from tests.tolerances import assert_close

from .test_cpu import OPERATIONS, Buffers, drawn_geometry, on_threads, operands

HIGH = np.inf
DEEP = blocking.DEPTH_BYTES // 4 + 7  # of float32 two parts of the depth, of float64 three


@kernel
def pack(dtype, workers, depth, filters, source, row_stride, column_stride, panels):
    packing.pack(dtype, workers, depth, filters, source, row_stride, column_stride, panels)


def compute(operation, g, inputs, residual, y, x_low=-np.inf, low=-np.inf, kept=0) -> None:
    """y by the kernel of an operation; the residual may be None."""
    scalar, count = y.dtype.type, threads.get_num_threads()
    x, *kernels, bias = (array.ctypes.data for array in inputs)
    x_low, low, high = scalar(x_low), scalar(low), scalar(HIGH)
    added = 0 if residual is None else residual.ctypes.data
    if operation == "depthwise":
        depthwise.convolve(scalar, g, x, x_low, *kernels, bias, y.ctypes.data, low, high, count)
    elif operation == "pointwise":
        rows, depth = inputs[0].shape
        filters = y.shape[-1]
        assert pointwise.multiply(
            scalar, rows, depth, filters, x, *kernels, filters, 1, kept, bias, added, y.ctypes.data, low, high, count
        )
    else:
        assert separable.try_forward(
            scalar, g, y.shape[-1], x, x_low, *kernels, kept, bias, added, y.ctypes.data, low, high, count
        )


def expected(operation, g, inputs, residual, x_low, low):
    """By the reference. x below x_low counts as that."""
    x, *others = inputs
    window = () if operation == "pointwise" else (g,)
    y = getattr(reference, f"{operation}_forward")(*window, np.maximum(x, x_low), *others)
    return np.maximum(y if residual is None else y + residual, low)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_the_reference(operation, dtype, rng):
    for _ in range(40):
        g, offset = drawn_geometry(rng), int(rng.integers(0, 16))
        values, out = operands(operation, g, int(rng.integers(1, 90)), rng)
        buffers = Buffers(dtype, offset)
        inputs = [buffers.input(array) for array in values]
        residual = None if operation == "depthwise" else buffers.input(rng.standard_normal(out))
        x_low = -np.inf if operation == "pointwise" else float(rng.choice([-np.inf, -0.25, 0.0]))
        low = float(rng.choice([-np.inf, 0.0]))
        y = buffers.output(out)
        compute(operation, g, inputs, residual, y, x_low, low)
        buffers.check()
        assert_close(f"{operation} {g}", y, expected(operation, g, inputs, residual, x_low, low))


@pytest.mark.parametrize("filters", [blocking.TILE_ROWS * 4, 256])
@pytest.mark.parametrize("depth", [1, 300, 600])
def test_residuals_of_whole_tiles_and_of_packed_kernels(depth, filters, rng):
    """Depths of one running sum and of several; rows that collide in the caches, and rows that do not."""
    g = resolve((2, 19, 18, depth), (3, 3, depth, 1), (1, 1), "same", (1, 1))
    values, out = operands("separable", g, filters, rng)
    buffers = Buffers("float32")
    inputs = [buffers.input(array) for array in values]
    residual, y, again = buffers.input(rng.standard_normal(out)), buffers.output(out), buffers.output(out)
    compute("separable", g, inputs, residual, y, 0.0, 0.0)
    packed = buffers.output((packing.packed_length(np.float32, depth, filters),))
    pack(np.float32, 2, depth, filters, inputs[2].ctypes.data, filters, 1, packed.ctypes.data)
    compute("separable", g, inputs, residual, again, 0.0, 0.0, packed.ctypes.data)
    buffers.check()
    exact = expected("separable", g, inputs, residual, 0.0, 0.0)
    assert_close("y", y, exact)
    assert_close("y of a packed kernel", again, exact)


def test_rows_that_go_by_slabs_are_never_split():
    """Else the number of threads would decide on how the kernel is packed, and so on the order of the sums."""
    for workers in range(1, 65):
        for filters in (1, 1000):
            assert blocking.row_parts(np.float32, blocking.THIN_ROWS, filters, workers) == 1


@pytest.mark.parametrize("rows", [blocking.WORKER_ROWS, 200, 500])
def test_rows_are_split_where_each_worker_has_enough_or_there_is_nothing_else_to_share_out(rows):
    width, workers = CHOSEN.vectors * CHOSEN.vector_bytes // 4, 2
    many, few = (blocking.row_parts(np.float32, rows, filters, workers) for filters in (8 * width, width))
    assert many == (2 if rows >= 2 * blocking.WORKER_ROWS else 1)
    assert few == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("depth", [1, gemm.EARLY, gemm.EARLY + 1, 2 * gemm.EARLY + 51, DEEP])
@pytest.mark.parametrize("filters", [1, 67, 130, 512])  # rows of 512 collide
def test_few_rows_by_slabs_of_the_kernel_and_great_depths_in_parts(depth, filters, dtype, rng):
    """As many rows as go by slabs, and more. Between two slabs, or parts, nothing is clamped, and no residual added."""
    for rows in (1, 9, blocking.TILE_ROWS, blocking.TILE_ROWS + 1, blocking.THIN_ROWS, blocking.THIN_ROWS + 1):
        shapes = (rows, depth), (depth, filters), (filters,), (rows, filters)
        values = [rng.standard_normal(shape) for shape in shapes]
        values[0].flat[-1] = np.nan
        buffers = Buffers(dtype, offset=int(rng.integers(0, 16)))
        *inputs, residual = (buffers.input(array) for array in values)
        results = []
        for count in (1, 2):
            results.append(buffers.output((rows, filters)))
            with on_threads(count):
                compute("pointwise", None, inputs, residual, results[-1], low=0.0)
        buffers.check()
        np.testing.assert_array_equal(*results)
        assert_close(f"{rows} rows", results[0], expected("pointwise", None, inputs, residual, -np.inf, 0.0))


@pytest.mark.parametrize(("depth", "filters"), [(3, 256), (DEEP, 1024)])
def test_a_residual_of_an_output_past_the_caches(depth, filters, rng):
    rows = gemm.STREAMED_BYTES // (4 * filters) + 5
    values = [rng.standard_normal(shape, "float32") for shape in ((rows, depth), (depth, filters), (filters,))]
    buffers = Buffers("float32")
    inputs = [buffers.input(array) for array in values]
    residual, y = buffers.input(rng.standard_normal((rows, filters))), buffers.output((rows, filters))
    compute("pointwise", None, inputs, residual, y)
    buffers.check()
    assert_close("y", y, expected("pointwise", None, inputs, residual, -np.inf, -np.inf))


@pytest.mark.parametrize("operation", ["depthwise", "separable"])
def test_a_relu_of_x_keeps_nan_and_infinity(operation, rng):
    for taps, channels in ((3, 70), (2, 19)):  # three taps slide, others do not
        g = resolve((1, 9, 11, channels), (taps, taps, channels, 1), (1, 1), "valid", (1, 1))
        values, out = operands(operation, g, 21, rng)
        inputs = [array.astype("float32") for array in values]
        for at, value in ((5, np.nan), (channels * 50 + 3, np.inf), (channels * 97 + 4, -np.inf)):
            inputs[0].flat[at] = value
        y = np.full(out, 7, "float32")
        compute(operation, g, inputs, None, y, 0.0)
        with np.errstate(invalid="ignore"):
            exact = expected(operation, g, inputs, None, 0.0, -np.inf)
        assert np.isnan(exact).any() and not np.isnan(exact).all()
        assert_close(operation, y, exact)


@pytest.mark.parametrize("target", ["avx2", "portable"])
def test_on_every_tile(target):
    """The tests above, in a process that compiles for another CPU."""
    run_again(__file__, target, but="test_on_every_tile")
