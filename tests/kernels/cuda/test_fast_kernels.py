"""The fast kernels' own text, run thread by thread in an emulation, against the float64 reference.

Every tile of the tables is run, on ragged sizes. The emulation also holds that nothing is read or written out of
bounds, that results are written once, that barriers stand between what one thread writes and another uses, and that
the banks of shared memory do not collide where the kernels spend their time.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")
import ml_dtypes

from fastsepconv.kernels import geometry, reference
from fastsepconv.kernels.cuda import (
    depthwise_window,
    partial_sums,
    pointwise_tensor,
    separable_rows,
    tiles,
    transposition,
)
from tests.kernels.cuda import emulator
from tests.kernels.cuda.fast_cases import FLOATS, TOLERANCES
from tests.tolerances import relative_error

MODULES = emulator.MODULES
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
POINTWISE = [
    pytest.param(dtype, tile, id=f"{dtype}-{tile.name}")
    for dtype, found in [*tiles.POINTWISE.items(), *tiles.WARPGROUP_POINTWISE.items()]
    for tile in found
]
WITH_KERNEL_GRADIENT = [
    case for case in POINTWISE if pointwise_tensor.kernel_gradient in pointwise_tensor.factories(*case.values)
]


def stored(values, dtype) -> np.ndarray:
    """As a kernel takes them: half numbers as their bits."""
    return values.astype(HALVES[dtype]).view(np.uint16) if dtype in HALVES else values.astype(np.float32)


def valued(array, dtype) -> np.ndarray:
    return (array.view(HALVES[dtype]) if dtype in HALVES else array).astype(np.float64)


def poisoned(shape, dtype) -> np.ndarray:
    return stored(np.full(shape, np.nan), dtype)


def rounded_tf32(values) -> np.ndarray:
    """float32 to the nearest TF32, of two the one farther from zero."""
    return ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def taken(w, dtype, tile) -> np.ndarray:
    """The kernel as a forward product of the tile takes it."""
    return np.ascontiguousarray(rounded_tf32(w).T) if tiles.takes_only_deep(dtype, tile) else w


def assert_close(name, ours, exact, dtype):
    assert np.isfinite(ours).all(), f"{name}: not everything was written"
    error = relative_error(ours, exact)
    assert error <= TOLERANCES[dtype], f"{name}: off by {error:.3g} of its largest value ({dtype})"


def assert_watched(watched, *, free_of_conflicts):
    assert watched.written[-1] == 1, "a result was written twice"
    assert all(watched.conflicts.get(kind, 0) == 0 for kind in free_of_conflicts), watched.conflicts


INNER_LOOP = ("copy", "matrix", "store32", "store64")  # with 4-byte loads added where fragments are loaded so


def inner_loop(dtype):
    return (*INNER_LOOP, "load32") if dtype in ("float32", "tf32") else INNER_LOOP


def problem(rng, dtype, tile):
    """Sizes that end inside of a tile, a copy plan's row and a step: (rows, columns, depth), and arrays."""
    sizes = (tile.rows + 22, tile.columns + 16, 104)
    if tile.copy_bytes == 4:
        sizes = (70, 66, 34) if dtype in HALVES else (67, 65, 35)
    rows, columns, depth = sizes
    shapes = (rows, depth), (depth, columns), (columns,), (rows, columns)
    return sizes, [stored(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(("dtype", "tile"), POINTWISE)
def test_pointwise_forward(dtype, tile, rng):
    (rows, columns, depth), (x, w, bias, _) = problem(rng, dtype, tile)
    y = poisoned((rows, columns), dtype)
    bounds = np.float32(-3), np.float32(20)
    arguments = (x, taken(w, dtype, tile), bias, y, rows, columns, depth, 1, *bounds)
    watched = emulator.run(MODULES, pointwise_tensor.forward, (dtype, tile), (rows, columns), arguments)
    exact = reference.pointwise_forward(*(valued(a, dtype) for a in (x, w, bias)))
    assert_close("y", valued(y, dtype), exact.clip(*bounds), dtype)
    assert_watched(watched, free_of_conflicts=inner_loop(dtype))


@pytest.mark.parametrize(("dtype", "tile"), POINTWISE)
def test_pointwise_input_gradient(dtype, tile, rng):
    (rows, columns, depth), (x, w, _, dy) = problem(rng, dtype, tile)
    dx = poisoned((rows, depth), dtype)
    arguments = (dy, w, dx, rows, depth, columns)
    watched = emulator.run(MODULES, pointwise_tensor.input_gradient, (dtype, tile), (rows, depth), arguments)
    exact, _, _ = reference.pointwise_backward(*(valued(a, dtype) for a in (x, w, dy)))
    assert_close("d_x", valued(dx, dtype), exact, dtype)
    assert_watched(watched, free_of_conflicts=INNER_LOOP)


@pytest.mark.parametrize(("dtype", "tile"), WITH_KERNEL_GRADIENT)
def test_pointwise_kernel_gradient(dtype, tile, rng):
    (depth, columns, rows), (x, w, _, dy) = problem(rng, dtype, tile)
    partials = np.full((-(-depth // 64), rows, columns), np.nan, np.float32)
    arguments = (x, dy, partials, rows, columns, depth, 64)
    factory = pointwise_tensor.kernel_gradient
    watched = emulator.run(MODULES, factory, (dtype, tile), (rows, columns, depth, 64), arguments)
    _, exact, _ = reference.pointwise_backward(*(valued(a, dtype) for a in (x, w, dy)))
    assert_close("d_kernel", partials.sum(0, dtype=np.float64), exact, "tf32" if dtype == "tf32" else "float32")
    assert_watched(watched, free_of_conflicts=inner_loop(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_pointwise_forward_by_copies_of_eight_bytes(dtype, rng):
    tile = tiles.POINTWISE[dtype][2]._replace(copy_bytes=8)
    rows, columns, depth = (70, 76, 36) if dtype in HALVES else (70, 66, 34)
    x, w = (stored(rng.standard_normal(shape), dtype) for shape in ((rows, depth), (depth, columns)))
    y, infinity = poisoned((rows, columns), dtype), np.float32(np.inf)
    arguments = (x, w, np.zeros(columns, x.dtype), y, rows, columns, depth, 0, -infinity, infinity)
    watched = emulator.run(MODULES, pointwise_tensor.forward, (dtype, tile), (rows, columns), arguments)
    assert_close("y", valued(y, dtype), valued(x, dtype) @ valued(w, dtype), dtype)
    assert_watched(watched, free_of_conflicts=inner_loop(dtype))


@pytest.mark.parametrize("shape", [(70, 45), (32, 64), (3, 130)], ids=str)
def test_a_transpose_is_rounded_and_conflicts_with_no_bank(shape, rng):
    w, out = rng.standard_normal(shape).astype(np.float32), poisoned(shape[::-1], "tf32")
    w[1, 2], w[2, 1] = np.nan, np.inf
    watched = emulator.run(MODULES, transposition.transpose, ("tf32",), shape, (w, out, *shape))
    np.testing.assert_array_equal(out, rounded_tf32(w).T)
    assert_watched(watched, free_of_conflicts=("store32", "load32"))


NAN_TILES = [(numbers, tiles.POINTWISE[numbers][2]) for numbers in ("float32", "tf32")]


@pytest.mark.parametrize(("numbers", "tile"), [*NAN_TILES, ("tf32", tiles.WARPGROUP_POINTWISE["tf32"][-1])])
def test_a_nan_passes_products(numbers, tile):
    x, w, y = np.ones((3, 16), np.float32), np.ones((16, 8), np.float32), poisoned((3, 8), "float32")
    x.view(np.uint32)[0, 3], x.view(np.uint32)[2, 5] = 0x7FFFFFFF, 0xFFFFFFFF
    bounds = np.float32(0), np.float32(6)
    arguments = (x, taken(w, numbers, tile), np.zeros(8, np.float32), y, 3, 8, 16, 0, *bounds)
    emulator.run(MODULES, pointwise_tensor.forward, (numbers, tile), (3, 8), arguments)
    assert np.isnan(y[[0, 2]]).all()
    assert (y[1] == 6).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_partial_sums(dtype, rng):
    partials = rng.standard_normal((5, 730)).astype(np.float32)
    out = poisoned(730, dtype)
    watched = emulator.run(MODULES, partial_sums.add_partials, (dtype,), (730,), (partials, out, 730, 5))
    in_order = sum(partials[1:], start=partials[0])
    np.testing.assert_array_equal(out, stored(in_order, dtype))
    assert watched.written == [0, 1]


def test_three_tf32_products_err_no_more_than_float32(rng):
    """Sums of one sign, where the tensor cores' cutting off adds up, and of both, as long as Xception's."""
    tile, size, depth = tiles.POINTWISE["float32"][2], 64, 728
    for shift in (0.0, 1.0):
        x, w = ((rng.random((a, b)) - 0.5 + shift).astype(np.float32) for a, b in ((size, depth), (depth, size)))
        y, bias, exact = poisoned((size, size), "float32"), np.zeros(size, np.float32), x.astype(np.float64) @ w
        infinity = np.float32(np.inf)
        arguments = (x, w, bias, y, size, size, depth, 0, -infinity, infinity)
        emulator.run(MODULES, pointwise_tensor.forward, ("float32", tile), (size, size), arguments)
        plain = np.zeros((size, size), np.float32)
        for k in range(depth):
            plain += x[:, k, None] * w[k]
        assert relative_error(y, exact) <= relative_error(plain, exact)
        assert relative_error(y, exact) <= 1e-6


IMAGES = [(2, 5, 23, 40), (1, 9, 7, 136)]  # two segments a row and few channels; one, and more than a warp's channels


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_depthwise_forward(dtype, stride, padding, image, rng):
    window, channels = tiles.WINDOWS[dtype][stride], image[3]
    check_depthwise_forward(dtype, window, padding, image, rng)
    assert tiles.depthwise_forward(dtype, (3, 3), (stride, stride), channels) is window
    assert tiles.depthwise_forward(dtype, (3, 3), (stride, stride), channels + 2) is None
    assert tiles.depthwise_forward(dtype, (3, 5), (stride, stride), channels) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_forward_with_five_by_five_taps(stride, rng):
    check_depthwise_forward("float32", tiles.WindowTile(5, stride, 4, 2, ""), "same", (1, 7, 23, 24), rng)


def check_depthwise_forward(dtype, window, padding, image, rng):
    batch, height, width, channels = image
    taps = (window.taps, window.taps, channels, 1)
    g = geometry.resolve(image, taps, (window.stride, window.stride), padding, (1, 1))
    x, w, bias = (stored(rng.standard_normal(shape), dtype) for shape in (image, taps, (channels,)))
    y, bounds = poisoned(g.output_shape, dtype), (np.float32(-2), np.float32(4))
    rows = batch * g.out_height
    arguments = (
        x, w, bias, y, rows, height, width, channels, g.out_height, g.out_width, g.pad_top, g.pad_left,
        window.groups(g.out_width), window.segments(g.out_width), window.channel_bits(channels), 1, *bounds,
    )  # fmt: skip
    sizes = (rows, channels, g.out_width)
    for relu in (False, True):
        y[...] = poisoned(1, dtype)
        tile = window._replace(relu=relu)
        watched = emulator.run(MODULES, depthwise_window.forward, (dtype, tile), sizes, arguments)
        values = [valued(a, dtype) for a in (x, w, bias)]
        values[0] = values[0].clip(0) if relu else values[0]
        assert_close("y", valued(y, dtype), reference.depthwise_forward(g, *values).clip(*bounds), dtype)
        assert_watched(watched, free_of_conflicts=())


def test_a_nan_passes_the_prologue_and_the_epilogue(rng):
    image, window = (1, 4, 5, 8), tiles.WINDOWS["float32"][1]._replace(relu=True)
    g = geometry.resolve(image, (3, 3, 8, 1), (1, 1), "valid", (1, 1))
    x, w = rng.standard_normal(image).astype(np.float32), np.ones((3, 3, 8), np.float32)
    x[0, 0, 0, 3] = np.nan
    y = np.zeros(g.output_shape, np.float32)
    arguments = (
        x, w, np.zeros(8, np.float32), y, 2, 4, 5, 8, 2, 3, 0, 0, window.groups(3), 1, window.channel_bits(8), 0,
        np.float32(0), np.float32(6),
    )  # fmt: skip
    emulator.run(MODULES, depthwise_window.forward, ("float32", window), (2, 8, 3), arguments)
    assert np.argwhere(np.isnan(y)).tolist() == [[0, 0, 0, 3]]


PADDINGS = ["same", "valid", ((2, 0), (0, 2)), ((1, 0), (1, 0))]  # of the last, strides of 2 leave pixels out


@pytest.mark.parametrize("image", [*IMAGES, (1, 4, 8, 24)], ids=str)  # of the last, even strides end with the image
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_depthwise_backward(dtype, stride, padding, image, rng):
    window, channels = tiles.GRADIENT_WINDOWS[stride], image[3]
    check_depthwise_backward(dtype, window, padding, image, rng)
    assert tiles.depthwise_backward(dtype, (3, 3), (stride, stride), channels) is window
    assert tiles.depthwise_backward(dtype, (3, 3), (stride, 3), channels) is None
    assert tiles.depthwise_backward(dtype, (3, 3), (stride, stride), channels + 2) is None


@pytest.mark.parametrize(("taps", "stride"), [(5, 1), (5, 2), (3, 3), (4, 2), (2, 3)])
def test_depthwise_backward_with_other_taps_and_strides(taps, stride, rng):
    """Taps of which a stride takes some twice, all once, and fewer than it is long."""
    check_depthwise_backward("float32", tiles.WindowTile(taps, stride, 4, 2, ""), "same", (1, 7, 23, 24), rng)


def check_depthwise_backward(dtype, window, padding, image, rng):
    batch, height, width, channels = image
    taps = (window.taps, window.taps)
    g = geometry.resolve(image, (*taps, channels, 1), (window.stride, window.stride), padding, (1, 1))
    x, w, dy = (stored(rng.standard_normal(shape), dtype) for shape in (image, g.kernel_shape, g.output_shape))
    dx, bands = poisoned(image, dtype), batch * tiles.bands_of(height, g.pad_top, window.stride)
    plan = window.gradient_plan(bands, channels, width)
    for strip in (plan.strip, plan.strip // 2 or 1):
        side = tiles.DEPTHWISE_THREADS >> plan.channel_bits
        strip = -(-strip // side) * side
        plan = plan._replace(strip=strip, splits=strip // side * plan.segments)
        partials = np.full((plan.splits, *taps, channels), np.nan, np.float32)
        dx[...] = poisoned(1, dtype)
        arguments = (
            x, w, dy, dx, partials, bands, height, width, channels, g.out_height, g.out_width, g.pad_top, g.pad_left,
            plan.groups, plan.share, plan.channel_bits, plan.strip,
        )  # fmt: skip
        watched = run_backward(dtype, window, plan, channels, arguments)
        exact_dx, exact_dw, _ = reference.depthwise_backward(g, *(valued(a, dtype) for a in (x, w, dy)))
        assert_close("d_x", valued(dx, dtype), exact_dx, dtype)
        assert_close("d_kernel", partials.sum(0, dtype=np.float64)[..., None], exact_dw, "float32")
        assert_watched(watched, free_of_conflicts=("store128", "load128"))
        assert watched.written[3] == 1


def run_backward(dtype, window, plan, channels, arguments):
    """With the blocks of this very plan, whatever the table would choose for so small an image."""
    blocks, threads = window.blocks_of(plan.strip, channels, plan.segments), tiles.DEPTHWISE_THREADS
    launch = tiles.Launch((blocks, 1, 1), threads, window.taps**2 * threads * 16)
    return emulator.run(MODULES, depthwise_window.backward, (dtype, window), launch, arguments)


SEPARABLE = [  # the tile's rows, dtype, stride, image, filters
    (96, "bfloat16", 1, (3, 7, 9, 88), 136),
    (64, "float16", 2, (2, 11, 23, 40), 264),
    (128, "bfloat16", 1, (1, 9, 45, 24), 72),
    (96, "float16", 1, (1, 9, 45, 64), 320),
]


@pytest.mark.parametrize(("rows", "dtype", "stride", "image", "filters"), SEPARABLE)
def test_separable_forward(rows, dtype, stride, image, filters, rng):
    gemm = next(tile for tile in tiles.SEPARABLE_GEMMS if tile.rows == rows)
    tile = tiles.SeparableTile(gemm, tiles.WINDOWS[dtype][stride]).after_relu()
    _, height, width, channels = image
    g = geometry.resolve(image, (3, 3, channels, 1), (stride, stride), "same", (1, 1))
    shapes = image, g.kernel_shape, (channels, filters), (filters,)
    x, depthwise, pointwise, bias = (stored(rng.standard_normal(shape), dtype) for shape in shapes)
    pixels, bounds = g.batch * g.out_height * g.out_width, (np.float32(-40), np.float32(50))
    y = poisoned((pixels, filters), dtype)
    arguments = (
        x, depthwise, pointwise, bias, y, pixels, height, width, channels, filters, g.out_height, g.out_width,
        g.pad_top, g.pad_left, tile.window.groups(g.out_width), tile.window.segments(g.out_width), 1, *bounds,
    )  # fmt: skip
    watched = emulator.run(MODULES, separable_rows.forward, (dtype, tile), (pixels, channels), arguments)
    mid = reference.depthwise_forward(g, valued(x, dtype).clip(0), valued(depthwise, dtype))
    rounded = valued(stored(mid, dtype), dtype).reshape(pixels, channels)
    exact = reference.pointwise_forward(rounded, valued(pointwise, dtype), valued(bias, dtype))
    assert_close("y", valued(y, dtype), exact.clip(*bounds), dtype)
    assert_watched(watched, free_of_conflicts=INNER_LOOP)


def test_separable_tiles_fit_the_card_and_the_shape():
    def choose(channels, limit, rows=32 * 361):
        found = separable_rows.choose("bfloat16", (3, 3), (1, 1), rows, channels, channels, limit)
        return found and found.gemm.rows

    assert choose(728, 232448) == 96  # 121 blocks in one round, where 128 rows make 91 and 64 make two rounds
    assert choose(728, 166912) == 64
    assert choose(1024, 232448) == 64
    assert choose(2048, 232448) is None
    assert separable_rows.choose("float32", (3, 3), (1, 1), 361, 728, 728, 232448) is None


def test_warpgroups_serve_half_numbers_and_tf32_on_their_own_capability_where_that_costs_less():
    def choose(dtype, capability, rows, columns=728):
        return tiles.pointwise(dtype, rows, columns, (728, columns), capability).name

    assert choose("bfloat16", (9, 0), 32 * 361) == "warpgroups192"
    assert choose("float16", (9, 0), 32 * 361, 256) == "warpgroups256"
    assert choose("bfloat16", (9, 0), 361) == "small"
    assert tiles.kernel_gradient("bfloat16", 728, 728, 32 * 361, (9, 0)).name == "warpgroups256"
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert choose("bfloat16", capability, 32 * 361) == "narrow"
        assert "warpgroups" not in tiles.kernel_gradient("bfloat16", 728, 728, 32 * 361, capability).name
    assert choose("tf32", (9, 0), 32 * 361) == "warpgroups192"
    assert choose("tf32", (8, 0), 32 * 361) == "narrow"
    assert choose("float32", (9, 0), 32 * 361) == choose("float32", (8, 0), 32 * 361)
    assert tiles.pointwise("bfloat16", 32 * 361, 34, (728, 34), (9, 0)).name == "unaligned"


def test_tf32_takes_warpgroups_where_that_is_worth_a_transpose():
    def choose(rows, depth, wide_depth, columns=728):
        return tiles.pointwise("tf32", rows, columns, (depth, columns), (9, 0), wide_depth).name

    assert choose(32 * 361, 728, 728) == "warpgroups192"
    assert choose(4 * 361, 728, 0) == "warpgroups128"  # 72 blocks, nothing to transpose
    assert choose(4 * 361, 728, 728) == "narrow"
    assert choose(32 * 361, 8, 0) == "warpgroups192"
    assert choose(32 * 361, 8, 8) == "narrow"
    for depth in (361, 32 * 361, 32 * 5329):
        assert "warpgroups" not in tiles.kernel_gradient("tf32", 728, 728, depth, (9, 0)).name


def test_pointwise_tiles_follow_the_shape():
    def choose(dtype, rows, columns, depth):
        found = tiles.pointwise(dtype, rows, columns, (depth, columns))
        return found and found.name

    assert choose("bfloat16", 32 * 361, 728, 728) == "narrow"
    assert choose("bfloat16", 32 * 37 * 37, 1024, 728) == "wide"
    assert choose("float32", 9, 128, 128) == "small"
    assert choose("float32", 32 * 361, 32, 3) == "unaligned"
    assert choose("tf32", 32 * 361, 32, 3) is None  # float32's kernel takes it
    assert choose("float16", 32 * 361, 32, 3) is None  # the plain tier takes it
    tile = tiles.kernel_gradient("bfloat16", 728, 728, 32 * 361)
    assert tile.name == "narrow"  # 42 blocks of 6 splits, where 144 of the small tile could not be split
    assert tiles.kernel_gradient("bfloat16", 64, 128, 361).name == "small"
    tile = tiles.pointwise("bfloat16", 728, 728, (728,))
    share = tiles.kernel_gradient_share(tile, 728, 728, 32 * 361)
    assert share % 32 == 0
    assert tile.blocks_of(728, 728) * -(-32 * 361 // share) >= tiles.REFERENCE_MULTIPROCESSORS
