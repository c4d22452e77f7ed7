"""Forward passes of bfloat16: sums in float32, a rounding of what lies between two steps, and one of the result."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fastsepconv.kernels import cpu, reference
from fastsepconv.kernels.cpu import gemm, packing, separable, threads, tiles
from fastsepconv.kernels.cpu.simd import BFLOAT16
from fastsepconv.kernels.geometry import resolve
from tests.targets import run_again

from .test_cpu import OPERATIONS, Buffers, drawn_geometry, operands
from .test_fused_forward import pack

HALF = np.dtype(ml_dtypes.bfloat16)
ROUNDING = 2.0**-8  # to the nearest, of a number's own size
SUMS = 1e-5  # of what a sum is made of: what float32 loses, and the lower digits that decide a rounding


def rounded(values) -> np.ndarray:
    return np.asarray(values).astype(HALF)


def hold(name: str, y, exact, terms) -> None:
    """Each element is the rounding of the exact one; `terms` is the same sum of absolute values."""
    assert y.dtype == HALF
    error = np.abs(y.astype(np.float64) - exact) - SUMS * terms
    assert (error <= ROUNDING * np.abs(exact)).all(), f"{name}: off by {error.max():.3g}"


def formula(operation, g, inputs) -> tuple[np.ndarray, np.ndarray]:
    """By the reference, and of absolute values. Between the steps of a separable convolution bfloat16 is rounded to."""
    inputs = [array.astype(np.float64) for array in inputs]
    absolute = [np.abs(array) for array in inputs]
    if operation == "separable":
        x, kernel, *others = inputs
        mid = np.empty(g.output_shape, HALF)
        cpu.depthwise_forward(g, rounded(x), rounded(kernel), None, mid)
        hold("mid", mid, reference.depthwise_forward(g, x, kernel), reference.depthwise_forward(g, *absolute[:2]))
        mid = mid.astype(np.float64).reshape(-1, g.output_shape[-1])
        y, terms = (reference.pointwise_forward(*sides) for sides in ((mid, *others), (np.abs(mid), *absolute[2:])))
        return (side.reshape(*g.output_shape[:3], side.shape[-1]) for side in (y, terms))
    window = () if operation == "pointwise" else (g,)
    return (getattr(reference, f"{operation}_forward")(*window, *sides) for sides in (inputs, absolute))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_is_the_rounding_of_the_exact_result(operation, rng):
    for _ in range(60):
        g, offset = drawn_geometry(rng), int(rng.integers(0, 32))
        values, out = operands(operation, g, int(rng.integers(1, 90)), rng)
        buffers = Buffers(HALF, offset)
        inputs, y = [buffers.input(array) for array in values], buffers.output(out)
        getattr(cpu, f"{operation}_forward")(*(() if operation == "pointwise" else (g,)), *inputs, y)
        buffers.check()
        hold(f"{operation} {g}", y, *formula(operation, g, inputs))


@pytest.mark.parametrize("filters", [64, 250])
@pytest.mark.parametrize("depth", [255, 300, 1024])
def test_sums_of_several_chunks_and_rows_that_collide(depth, filters, rng):
    g = resolve((2, 19, 18, depth), (3, 3, depth, 1), (1, 1), "same", (1, 1))
    for operation in ("separable", "pointwise"):
        values, out = operands(operation, g, filters, rng)
        buffers = Buffers(HALF)
        inputs, y = [buffers.input(array) for array in values], buffers.output(out)
        getattr(cpu, f"{operation}_forward")(*(() if operation == "pointwise" else (g,)), *inputs, y)
        buffers.check()
        hold(operation, y, *formula(operation, g, inputs))


@pytest.mark.parametrize("filters", [256, 255])
def test_an_output_past_the_caches(filters, rng):
    rows = gemm.STREAMED_BYTES // (2 * filters) + 5
    buffers = Buffers(HALF)
    x, kernel, bias = (buffers.input(rng.standard_normal(shape)) for shape in ((rows, 3), (3, filters), (filters,)))
    y = buffers.output((rows, filters))
    cpu.pointwise_forward(x, kernel, bias, y)
    buffers.check()
    hold("y", y, *formula("pointwise", None, [x, kernel, bias]))


@pytest.mark.parametrize("depth", [19, 20])
def test_what_a_frozen_model_has_it_compute_besides(depth, rng):
    """A ReLU of x, a packed kernel, a residual, a ReLU of the result."""
    g, filters = resolve((1, 9, 11, depth), (3, 3, depth, 1), (1, 1), "same", (1, 1)), 70
    values, out = operands("separable", g, filters, rng)
    buffers = Buffers(HALF)
    inputs, residual = [buffers.input(array) for array in values], buffers.input(rng.standard_normal(out))
    panels, y = buffers.output((packing.packed_length(BFLOAT16, depth, filters),)), buffers.output(out)
    x, kernel, mixing, bias = (array.ctypes.data for array in inputs)
    pack(BFLOAT16, 2, depth, filters, mixing, filters, 1, panels.ctypes.data)
    low, high = np.float32(0), np.float32(np.inf)
    assert separable.try_forward(
        BFLOAT16, g, filters, x, low, kernel, mixing, panels.ctypes.data, bias, residual.ctypes.data, y.ctypes.data,
        low, high, threads.get_num_threads(),
    )  # fmt: skip
    buffers.check()
    inputs[0] = np.maximum(inputs[0], rounded(0))
    exact, terms = formula("separable", g, inputs)
    hold("y", y, np.maximum(exact + residual.astype(np.float64), 0), terms + np.abs(residual.astype(np.float64)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nan_and_infinity_pass_and_reach_no_other_pixel(operation, rng):
    g = resolve((1, 9, 11, 7), (3, 3, 7, 1), (1, 1), "same", (1, 1))  # 7: half of a pair is left over
    values, out = operands(operation, g, 21, rng)
    inputs = [rounded(array) for array in values]
    for at, value in ((5, np.nan), (7 * 50 + 3, np.inf), (7 * 97 + 6, -np.inf)):
        inputs[0].flat[at] = value
    y = np.full(out, 7, HALF)
    getattr(cpu, f"{operation}_forward")(*(() if operation == "pointwise" else (g,)), *inputs, y)
    with np.errstate(invalid="ignore"):
        exact = getattr(reference, f"{operation}_forward")(*(() if operation == "pointwise" else (g,)), *inputs)
    finite = np.isfinite(exact)
    assert finite.any() and not finite.all()
    np.testing.assert_array_equal(y[~finite].astype(np.float64), exact[~finite])
    assert np.isfinite(y[finite]).all()


def test_ties_are_rounded_to_even_and_what_is_too_large_to_infinity():
    x = rounded([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8], [3.3e38, 3.3e38], [-3.3e38, -3.3e38]])
    y = np.empty((4, 1), HALF)
    cpu.pointwise_forward(x, rounded([[1.0], [1.0]]), None, y)
    assert y.ravel().astype(float).tolist() == [1.0, 1.0 + 2.0**-6, np.inf, -np.inf]


@pytest.mark.parametrize("target", ["avx2", "portable"])
def test_on_every_tile(target):
    """The tests above, in a process that compiles for a CPU without instructions for bfloat16."""
    run_again(__file__, target, but="test_on_every_tile")


def test_is_handed_over_as_it_is_where_the_cpu_multiplies_it():
    has_instructions = tiles.CHOSEN.name in ("avx512", "amx") and "+avx512bf16" in tiles.target()[1]
    assert ({"bfloat16"} if has_instructions else set()) == cpu.FORWARD_HALVES
