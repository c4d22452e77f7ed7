"""What only a card can show of the fast tier: `CUDA_VISIBLE_DEVICES=0 pytest -m cuda`. Skipped everywhere else.

The cases that the emulation has computed, and Xception's shapes, which it is too slow for.
"""

from __future__ import annotations

import operator

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

from fastsepconv.kernels.cuda import tiles
from fastsepconv.kernels.geometry import resolve
from tests.kernels.cuda.fast_cases import DTYPES, FLOATS, POINTWISE, SEPARABLE, WINDOWS, check, normal, separable_inputs

pytestmark = pytest.mark.cuda

name_of = operator.attrgetter("name")
LARGE_PRODUCTS = [(2 * 361, 728, 728), (4 * 1369, 256, 728), (2 * 100, 1536, 2048), (3 * 5329, 128, 128)]
LARGE_WINDOWS = [(2, 19, 19, 728), (1, 37, 37, 256), (1, 147, 147, 64), (2, 10, 10, 1536)]


@pytest.fixture
def ran(monkeypatch):
    """The kernels that were launched; the fast tier is asked for, and an error is raised where it happens."""
    from fastsepconv.kernels.cuda import launch

    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "fast")
    monkeypatch.setattr(launch, "DEBUG", True)
    names: list[str] = []
    launch.listeners.append(names.append)
    yield names
    launch.listeners.remove(names.append)


@pytest.fixture(params=DTYPES)
def numbers(request, ran, monkeypatch) -> str:
    """What numbers are multiplied as."""
    monkeypatch.setenv("FASTSEPCONV_TF32", str(int(request.param == "tf32")))
    return request.param


@pytest.mark.parametrize("sizes", [*POINTWISE, *LARGE_PRODUCTS], ids=str)
def test_pointwise(numbers, sizes, ran, rng):
    rows, channels, filters = sizes
    x, kernel = normal(rng, (rows, channels), (channels, filters))
    check(numbers, "pointwise", (), [x, kernel / np.sqrt(channels)], *normal(rng, (filters,), (rows, filters)))
    assert ran[2].startswith("pointwise_kernel_gradient[")


@pytest.mark.parametrize("numbers", ["tf32", "bfloat16", "float16"], indirect=True)
@pytest.mark.parametrize("tile", [*tiles.POINTWISE["float16"][:3], *tiles.WARPGROUP_POINTWISE["float16"]], ids=name_of)
def test_pointwise_with_each_tile(numbers, tile, ran, monkeypatch, rng):
    """Whatever the table would choose, so that a tile that fails is known by its name."""
    from fastsepconv.kernels.cuda import driver

    assert tile in tiles.POINTWISE[numbers] + tiles.WARPGROUP_POINTWISE[numbers]

    if tile.architecture == tiles.HOPPER and driver.device(0).capability != tiles.HOPPER[:2]:
        pytest.skip("the instructions of warpgroups are those of compute capability 9.0")
    only_deep = tiles.takes_only_deep(numbers, tile)
    for choice in ("pointwise",) if only_deep else ("pointwise", "kernel_gradient"):
        monkeypatch.setattr(tiles, choice, lambda *arguments: tile)
    for rows, channels, filters in ((16, 16, 16), (722, 728, 728), (1500, 136, 456)):
        x, kernel = normal(rng, (rows, channels), (channels, filters))
        check(numbers, "pointwise", (), [x, kernel / np.sqrt(channels)], *normal(rng, (filters,), (rows, filters)))
    assert sum(tile.name in one for one in ran) == (6 if only_deep else 9)
    assert ran.count("transpose[tf32]") == (3 if only_deep else 0)


@pytest.mark.parametrize("numbers", FLOATS)
@pytest.mark.parametrize("window", [*WINDOWS.values(), *((image, "same") for image in LARGE_WINDOWS)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(numbers, stride, window, ran, rng):
    image, padding = window
    g = resolve(image, (3, 3, image[3], 1), (stride, stride), padding, (1, 1))
    inputs = normal(rng, image, g.kernel_shape)
    check(numbers, "depthwise", (g,), inputs, *normal(rng, (image[3],), g.output_shape))
    assert f"_s{stride}_" in ran[0] and ran[1].startswith("depthwise_backward[") and f"_s{stride}_" in ran[1]


LARGE_SEPARABLE = [
    (image, (3, 3), 1, 1, filters) for image, filters in zip(LARGE_WINDOWS, (728, 728, 128, 2048), strict=True)
]


@pytest.mark.parametrize("mid_cost", [0.0, float("inf")], ids=["mid is free", "mid costs all"])
@pytest.mark.parametrize("case", [*(case[:5] for case in SEPARABLE.values()), *LARGE_SEPARABLE], ids=str)
def test_separable(numbers, case, mid_cost, ran, monkeypatch, rng):
    from fastsepconv.kernels.cuda import fast_separable

    monkeypatch.setattr(fast_separable, "MID_COST", mid_cost)
    image, taps, multiplier, stride, filters = case
    g = resolve(image, (*taps, image[3], multiplier), (stride, stride), "same", (1, 1))
    out = *g.output_shape[:3], filters
    check(numbers, "separable", (g,), separable_inputs(rng, g, filters), *normal(rng, (filters,), out))
    assert any(name.startswith("pointwise_kernel_gradient[") for name in ran)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_card_computes_the_same_bits_at_every_call(half, ran, rng):
    from fastsepconv.kernels import cuda

    g = resolve((2, 19, 19, 256), (3, 3, 256, 1), (1, 1), "same", (1, 1))
    inputs = [array.astype(DTYPES[half]) for array in separable_inputs(rng, g, 304)]
    dy = rng.standard_normal((2, 19, 19, 304)).astype(DTYPES[half])
    runs = [[np.full(array.shape, np.nan, dy.dtype) for array in (*inputs, dy[0, 0, 0])] for _ in range(3)]
    for gradients in runs:
        cuda.separable_backward(g, *inputs, dy, *gradients)
    for again in runs[1:]:
        for first, gradient in zip(runs[0], again, strict=True):
            np.testing.assert_array_equal(gradient.view(np.uint16), first.view(np.uint16))
