"""Whole operations of the fast tier, forward and backward, against the float64 reference, without a card.

NumPy arrays go through the public functions, the table of tiers, the choice of tiles, scratch memory and the packing
of arguments to a driver that stands for NVIDIA's; what it is told to launch runs in an emulation, the kernels' own text
on the grids, shared memory and addresses that the host gave. So host and kernels are proved to fit together, and every
access to lie inside of what was allocated.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

from fastsepconv.kernels import cuda
from fastsepconv.kernels.geometry import resolve
from tests.kernels.cuda.fast_cases import (
    DTYPES,
    FLOATS,
    POINTWISE,
    SEPARABLE,
    WINDOWS,
    check,
    normal,
    separable_inputs,
)

INFINITE = float("inf")


@pytest.fixture(params=DTYPES)
def numbers(request, emulated, monkeypatch) -> str:
    """What numbers are multiplied as."""
    if request.param == "tf32":
        monkeypatch.setenv("FASTSEPCONV_TF32", "1")
    return request.param


def names(emulated) -> list[str]:
    """The kernels that ran since the last call, without what they ran on."""
    ran = [name.partition("[")[0] for name in emulated.ran]
    emulated.ran.clear()
    return ran


@pytest.mark.parametrize("sizes", POINTWISE, ids=str)
def test_pointwise(numbers, sizes, emulated, rng):
    rows, channels, filters = sizes
    inputs = normal(rng, (rows, channels), (channels, filters))
    check(numbers, "pointwise", (), inputs, *normal(rng, (filters,), (rows, filters)))
    aligned = channels % 8 == 0
    used = numbers if aligned or numbers != "tf32" else "float32"
    tile = "small" if aligned else "unaligned"
    assert emulated.ran[:3] == [
        f"pointwise_{way}[{used},{tile}]" for way in ("forward", "input_gradient", "kernel_gradient")
    ]
    assert names(emulated)[3:] == ["add_partials", "row_sums", "part_sums"]
    assert emulated.launches[2]["grid"][1] == max(1, rows // 256)
    assert not emulated.memory


WARPGROUPS = ["warpgroups256", "warpgroups192", "warpgroups128"]


def tile_named(numbers, name):
    from fastsepconv.kernels.cuda import tiles

    return next(one for one in tiles.POINTWISE[numbers] + tiles.WARPGROUP_POINTWISE[numbers] if one.name == name)


@pytest.mark.parametrize("tile", ["wide", "narrow", *WARPGROUPS])
def test_pointwise_with_the_tiles_of_large_shapes(tile, emulated, monkeypatch, rng):
    from fastsepconv.kernels.cuda import tiles

    found = tile_named("bfloat16", tile)
    for choice in ("pointwise", "kernel_gradient"):
        monkeypatch.setattr(tiles, choice, lambda *arguments: found)
    inputs = normal(rng, (600, 136), (136, 144))
    check("bfloat16", "pointwise", (), inputs, *normal(rng, (144,), (600, 144)))
    assert emulated.ran[:3] == [
        f"pointwise_{way}[bfloat16,{tile}]" for way in ("forward", "input_gradient", "kernel_gradient")
    ]


@pytest.mark.parametrize("numbers", ["tf32"], indirect=True)
@pytest.mark.parametrize("tile", WARPGROUPS)
def test_pointwise_by_tf32_on_warpgroups(numbers, tile, emulated, monkeypatch, rng):
    """Forward after a transpose of the kernel, which lasts no longer; the kernel's gradient by other tiles."""
    from fastsepconv.kernels.cuda import tiles

    monkeypatch.setattr(tiles, "pointwise", lambda *arguments: tile_named(numbers, tile))
    inputs = normal(rng, (300, 136), (136, 148))
    check(numbers, "pointwise", (), inputs, *normal(rng, (148,), (300, 148)))
    assert emulated.ran[:4] == [
        "transpose[tf32]",
        f"pointwise_forward[tf32,{tile}]",
        f"pointwise_input_gradient[tf32,{tile}]",
        "pointwise_kernel_gradient[tf32,small]",
    ]
    assert not emulated.memory


@pytest.mark.parametrize("numbers", ["tf32"], indirect=True)
def test_separable_by_tf32_on_warpgroups(numbers, emulated, monkeypatch, rng):
    from fastsepconv.kernels.cuda import tiles

    monkeypatch.setattr(tiles, "pointwise", lambda *arguments: tile_named(numbers, WARPGROUPS[-1]))
    g = resolve((2, 5, 23, 40), (3, 3, 40, 1), (1, 1), "same", (1, 1))
    inputs, out = separable_inputs(rng, g, 24), (*g.output_shape[:3], 24)
    check(numbers, "separable", (g,), inputs, *normal(rng, (24,), out))
    assert [name for name in emulated.ran if "tf32" in name] == [
        "transpose[tf32]",
        "pointwise_forward[tf32,warpgroups128]",
        "pointwise_input_gradient[tf32,warpgroups128]",
        "pointwise_kernel_gradient[tf32,small]",
    ]
    assert not emulated.memory


@pytest.mark.parametrize("numbers", FLOATS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(numbers, stride, window, emulated, rng):
    image, padding = window
    g = resolve(image, (3, 3, image[3], 1), (stride, stride), padding, (1, 1))
    inputs = normal(rng, image, g.kernel_shape)
    check(numbers, "depthwise", (g,), inputs, *normal(rng, (image[3],), g.output_shape))
    assert names(emulated) == ["depthwise_forward", "depthwise_backward", "add_partials", "row_sums", "part_sums"]
    assert not emulated.memory


@pytest.mark.parametrize("numbers", FLOATS[:2])
@pytest.mark.parametrize("stride", [1, 2])
def test_threads_take_several_bands_where_the_card_is_full(numbers, stride, emulated, monkeypatch, rng):
    from fastsepconv.kernels.cuda import tiles

    monkeypatch.setattr(tiles, "REFERENCE_MULTIPROCESSORS", 1)
    image = (5, 13 * stride, 43, 136)
    g = resolve(image, (3, 3, 136, 1), (stride, stride), "same", (1, 1))
    bands = image[0] * tiles.bands_of(g.height, g.pad_top, stride)
    assert tiles.GRADIENT_WINDOWS[stride].gradient_plan(bands, 136, 43).strip < bands
    check(numbers, "depthwise", (g,), normal(rng, image, g.kernel_shape), *normal(rng, (136,), g.output_shape))


@pytest.mark.parametrize("case", SEPARABLE.values(), ids=SEPARABLE.keys())
def test_separable(numbers, case, emulated, monkeypatch, rng):
    from fastsepconv.kernels.cuda import fast_separable

    monkeypatch.setattr(fast_separable, "MID_COST", INFINITE)
    image, taps, multiplier, stride, filters, window = case
    g = resolve(image, (*taps, image[3], multiplier), (stride, stride), "same", (1, 1))
    inputs, out = separable_inputs(rng, g, filters), (*g.output_shape[:3], filters)
    check(numbers, "separable", (g,), inputs, *normal(rng, (filters,), out))
    fused = DTYPES[numbers] is not np.float32 and window
    forward = ["separable_forward"] if fused else ["depthwise_forward", "pointwise_forward"]
    products = ["pointwise_input_gradient", "pointwise_kernel_gradient", "add_partials", "row_sums", "part_sums"]
    plain = ["depthwise_d_x", "depthwise_d_kernel", "part_sums"]
    gradients = ["depthwise_backward", "add_partials"] if window else plain
    assert names(emulated) == [*forward, "depthwise_forward", *products, *gradients]
    assert not emulated.memory


@pytest.mark.parametrize("why", ["shared memory is short", "pixels are few"])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_separable_in_two_kernels(half, why, emulated, monkeypatch, rng):
    from fastsepconv.kernels.cuda import fast_separable

    if why == "shared memory is short":
        emulated.shared_limit = 48 * 1024
        monkeypatch.setattr(fast_separable, "MID_COST", INFINITE)
    g = resolve((1, 6, 9, 136), (3, 3, 136, 1), (1, 1), "same", (1, 1))
    inputs, out = separable_inputs(rng, g, 40), (*g.output_shape[:3], 40)
    check(half, "separable", (g,), inputs, *normal(rng, (40,), out), backward=False)
    assert names(emulated) == ["depthwise_forward", "pointwise_forward"]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_relu_of_x_first(numbers, stride, emulated, monkeypatch, rng):
    """In the one kernel that is fused, in the first of two, and in that of a depthwise convolution alone."""
    from fastsepconv.kernels.cuda import fast_separable

    monkeypatch.setattr(fast_separable, "MID_COST", INFINITE)
    dtype, g = DTYPES[numbers], resolve((2, 5, 23, 40), (3, 3, 40, 1), (stride, stride), "same", (1, 1))
    x, *kernels = (array.astype(dtype) for array in separable_inputs(rng, g, 24))
    for operation, operands, out in (
        ("depthwise", kernels[:1], g.output_shape),
        ("separable", kernels, (*g.output_shape[:3], 24)),
    ):
        y, expected = np.full((2, *out), 7, dtype)
        compute = getattr(cuda, f"{operation}_forward")
        compute(g, x, *operands, None, y, relu_x=True)
        (first, *_) = emulated.ran
        assert first.endswith("_relu]") and not any("_relu]" in name for name in emulated.ran[1:])
        one_kernel = operation == "depthwise" or dtype is not np.float32
        assert names(emulated) == (
            [f"{operation}_forward"] if one_kernel else ["depthwise_forward", "pointwise_forward"]
        )
        compute(g, np.maximum(x, dtype(0)), *operands, None, expected)
        assert not any("_relu]" in name for name in emulated.ran)
        np.testing.assert_array_equal(y, expected)
        emulated.ran.clear()
    assert not emulated.memory


@pytest.mark.parametrize("operation", ["depthwise", "pointwise", "separable"])
def test_only_what_is_wanted_is_computed_and_the_same_bits_at_every_call(operation, emulated, rng):
    g = resolve((2, 5, 6, 16), (3, 3, 16, 1), (1, 1), "same", (1, 1))
    shapes = {
        "depthwise": [g.input_shape, g.kernel_shape, (16,)],
        "pointwise": [(60, 16), (16, 24), (24,)],
        "separable": [g.input_shape, g.kernel_shape, (16, 24), (24,)],
    }[operation]
    out = {"depthwise": g.output_shape, "pointwise": (60, 24), "separable": (2, 5, 6, 24)}[operation]
    *inputs, dy = (array.astype(np.float16) for array in normal(rng, *shapes[:-1], out))
    before = () if operation == "pointwise" else (g,)
    backward = getattr(cuda, f"{operation}_backward")
    everything = [np.full(shape, np.nan, np.float16) for shape in shapes]
    backward(*before, *inputs, dy, *everything)
    for wanted, gradient in enumerate(everything):
        alone = [np.full(shape, np.nan, np.float16) if i == wanted else None for i, shape in enumerate(shapes)]
        names(emulated)
        backward(*before, *inputs, dy, *alone)
        np.testing.assert_array_equal(alone[wanted], gradient)
        assert len(names(emulated)) <= {"depthwise": 2, "pointwise": 2, "separable": 5}[operation]
        assert not emulated.memory
