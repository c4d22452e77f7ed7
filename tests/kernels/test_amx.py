"""What AMX multiplies in three terms of bfloat16 is as exact as float32, and what is not finite comes out right."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes  # noqa: F401 (so that NumPy knows bfloat16)
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from fastsepconv.kernels import cpu
from fastsepconv.kernels.cpu import amx, amx_gemm, amx_packing, tiles
from fastsepconv.kernels.cpu.jit import entry

from .test_cpu import on_threads

pytestmark = pytest.mark.skipif(not tiles.CHOSEN.matrices, reason="needs a CPU with AMX, and a system that allows it")

ROOT = Path(__file__).parents[2]
LARGEST = np.finfo(np.float32).max
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, LARGEST, -LARGEST, 3.4e38, 2.0**-126, 2.0**-149, 1 - 2.0**-24]
NANS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FFF8000]  # to round the bits of the first two makes zeros of them
AWAY = 7.0


@entry
def split_and_join_rows(depth, source, tile, joined):
    """32 rows, in terms and back."""
    amx_packing.split_rows(amx.SIDE, depth, source, depth * 4, tile)
    amx_gemm._join_rows(depth, tile, joined)


@entry
def split_and_join_panel(depth, source, transposed, tile, joined):
    """32 columns; of their transpose, if so."""
    if transposed:
        amx_packing.split_transposed_panel(depth, amx.SIDE, source, depth * 4, tile)
    else:
        amx_packing.split_panel(np.float32, depth, amx.SIDE, source, amx.SIDE * 4, tile)
    amx_gemm._join_panel(depth, tile, joined)


def aligned(size: int) -> np.ndarray:
    """So many float32 that begin with a cache line, all of them NaN."""
    room = np.full(size + 16, np.nan, np.float32)
    first = -room.ctypes.data % 64 // 4
    return room[first : first + size]


def of_all_magnitudes(rng, shape) -> np.ndarray:
    """Every exponent, and the special values."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-149, 128, shape)
    values.flat[: len(SPECIAL)] = SPECIAL
    values = values.astype(np.float32)
    values.view(np.uint32).flat[-len(NANS) :] = NANS
    return values


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", ["rows", "panel", "transposed panel"])
def test_a_float32_is_the_sum_of_its_terms(kind, rng):
    depth = 3 * amx.STEP
    values = of_all_magnitudes(rng, (amx.SIDE, depth))
    source = values.T.copy() if kind == "panel" else values
    tile, joined = aligned(amx_packing.split_bytes(amx.SIDE, depth) // 4), aligned(amx.SIDE * depth)
    addresses = source.ctypes.data, tile.ctypes.data, joined.ctypes.data
    if kind == "rows":
        split_and_join_rows(depth, *addresses)
    else:
        split_and_join_panel(depth, addresses[0], kind != "panel", *addresses[1:])
    back = joined.reshape(values.shape) if kind == "rows" else joined.reshape(values.shape[::-1]).T
    small = np.abs(values) < 2.0**-100  # bfloat16 holds nothing below 2^-126 in full
    assert np.all(np.abs(back[small] - values[small]) <= 2.0**-126)
    np.testing.assert_array_equal(np.where(small, 0, back), np.where(small, 0, values))


@pytest.mark.parametrize("depth", [1, 8, 33, 728, 1025, 2100])
def test_errs_no_more_than_float32(depth, rng):
    """Against the sum of magnitudes. Few products err up to eight times as much as one that is rounded, 2^-24: six are
    added. Of many the sum decides, of which each step adds 32."""
    rows, filters = 77, 45
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, depth), (depth, filters)))
    x *= np.float32(2) ** rng.integers(-40, 40, (rows, 1)).astype(np.float32)
    kernel *= np.float32(2) ** rng.integers(-40, 40, filters).astype(np.float32)
    y = np.full((rows, filters), AWAY, np.float32)
    cpu.pointwise_forward(x, kernel, None, y)
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    error = np.abs(y - x @ kernel) / (np.abs(x) @ np.abs(kernel))
    root_mean_square = np.sqrt(np.mean(error**2))
    assert root_mean_square < (2.0**-24 if depth < 33 else 2.0**-25)
    assert error.max() < 2.0**-21


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_what_is_not_finite_stays_what_it_is_and_where(rng):
    """An infinity times what has but one term, a NaN of either side, and products that are too large."""
    rows, depth, filters = 70, 1100, 40
    x, kernel = np.ones((rows, depth), np.float32), rng.integers(1, 4, (depth, filters)).astype(np.float32)
    x[3, 1050], x[5, 7], x[64, 0] = np.inf, np.nan, -np.inf
    x.view(np.uint32)[[20, 21, 22, 23], 999] = NANS
    x[9, 40], x[11, 31], x[12, 600] = 3.4e38, 3.39e38, LARGEST
    kernel[:, 7], kernel[20, 9], kernel[30, 35] = 0, np.inf, np.nan
    kernel[2, 11] = LARGEST
    kernel.view(np.uint32)[900, [1, 2, 3, 4]] = NANS
    dy = rng.standard_normal((rows, filters)).astype(np.float32)
    dy[8, 8] = np.inf
    results = []
    for threads in (1, 2):
        y, dx, d_kernel = np.full((rows, filters), AWAY, np.float32), np.full_like(x, AWAY), np.full_like(kernel, AWAY)
        with on_threads(threads):
            cpu.pointwise_forward(x, kernel, None, y)
            cpu.pointwise_backward(x, kernel, dy, dx, d_kernel, None)
        results.append((y, dx, d_kernel))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    for result, a, b in zip(results[0], (x, dy, x.T), (kernel, kernel.T, dy), strict=True):
        with np.errstate(all="ignore"):
            exact = a.astype(np.float64) @ b.astype(np.float64)
            exact = np.where(np.abs(exact) > LARGEST, np.sign(exact) * np.inf, exact)
            magnitude = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
        finite = np.isfinite(exact)
        assert finite.any() and not finite.all()
        np.testing.assert_array_equal(result[~finite], exact[~finite])
        assert np.all(np.abs(result - exact)[finite] <= 2.0**-21 * magnitude[finite])


@pytest.mark.parametrize(("scalar", "products", "loads"), [(types.float32, 24, 14), (types.uint16, 4, 4)])
def test_a_step_multiplies_two_tiles_by_two_and_loads_none_too_often(scalar, products, loads):
    """Of float32 six products of terms. There is a loop for 32 rows and one for 16, which loads a once less often."""
    code = f"print(inner_loops.assembly('amx_gemm.multiply_panel', types.{scalar}))"
    code = f"from numba import types; from tests.kernels import inner_loops; {code}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    counted = Counter(re.findall(r"\t(tdpbf16ps|tileloadd|tilestored)\t", process.stdout))
    loads_of_16_rows = loads - (4 if products == 24 else 1)
    assert counted == {
        "tdpbf16ps": products + products // 2,
        "tileloadd": loads + loads_of_16_rows,
        "tilestored": 4 + 2,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_products_at_all_leave_the_bias(dtype):
    x, kernel, bias = (np.ones(shape, dtype) for shape in ((70, 0), (0, 40), 40))
    y = np.full((70, 40), AWAY, dtype)
    cpu.pointwise_forward(x, kernel, bias, y)
    np.testing.assert_array_equal(y.astype(np.float32), 1)


@intrinsic
def layout_of_the_registers(typing_context, target):
    """Writes down the 64 bytes of it."""

    def codegen(context, builder, signature, arguments):
        amx.emit_call(builder, "sttilecfg", amx.pointer(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@entry
def layouts_around(target, inside):
    """That between `begin_tiles` and `end_tiles`, and before them."""
    layout_of_the_registers(target)
    amx.begin_tiles(np.float32)
    layout_of_the_registers(inside)
    amx.end_tiles(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_gives_the_registers_back(dtype):
    """As another that uses them finds them in this thread, which took part in it."""
    before, inside = np.full((2, 64), 7, np.uint8)
    x, kernel = np.ones((70, 64), dtype), np.ones((64, 40), dtype)
    with on_threads(1):
        cpu.pointwise_forward(x, kernel, None, np.empty((70, 40), dtype))
        layouts_around(before.ctypes.data, inside.ctypes.data)
    assert inside[0] == 1 and not before.any()
