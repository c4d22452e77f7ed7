"""The fast tier's way to the driver: when it is used, what it is given, and that nothing of it is left behind."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

from fastsepconv.kernels import cuda
from fastsepconv.kernels.device_array import DeviceArray, Dtype
from fastsepconv.kernels.geometry import resolve
from tests.kernels.cuda.driver_double import CONTEXT, values_at

STREAM = 4242
INFINITY = float("inf")
HOPPER_SHARED = 227 * 1024  # bytes that a block may have on cards of compute capability 9.0
LEAST_SHARED = 99 * 1024  # bytes that a block may have on the smallest cards of the least capability's generation


@pytest.fixture
def card(double, monkeypatch):
    """The driver's double, for which nothing is compiled; the fast tier is asked for."""
    from fastsepconv.kernels.cuda import binaries

    monkeypatch.setattr(binaries, "get", lambda kernel, capability: binaries.Binary(kernel.name, b""))
    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "fast")
    return double


@pytest.fixture
def ran(card):
    """The names of the kernels, as they are launched."""
    from fastsepconv.kernels.cuda import launch

    names: list[str] = []
    launch.listeners.append(names.append)
    yield names
    launch.listeners.remove(names.append)


def on_card(double, shape, dtype="float32", shift=0):
    """An array in the double's memory, `shift` bytes behind an address that kernels can read at."""
    _, address = double.cuMemAllocAsync(int(np.prod(shape)) * Dtype(dtype).itemsize + shift, STREAM)
    return DeviceArray(address + shift, shape, (), Dtype(dtype), 0, STREAM, True, None)


def test_the_fast_tier_is_used_only_where_it_is_asked_for(card, ran, monkeypatch):
    arrays = [on_card(card, shape) for shape in ((4, 8), (8, 8), (4, 8))]
    for setting, used in (("fast", "small"), ("plain", "float32,float32"), (None, "float32,float32")):
        monkeypatch.delenv("FASTSEPCONV_CUDA_TIER")
        monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", setting or "")
        cuda.pointwise_forward(*arrays[:2], None, arrays[2])
        assert ran.pop() == f"pointwise_forward[float32,{used}]"


def test_the_log_tells_which_tier_ran(card, caplog):
    """In the fast tier a separable step without a window in registers is a plain kernel, and said to be one."""
    g = resolve((1, 5, 5, 8), (5, 5, 8, 1), (1, 1), "same", (1, 1))
    arrays = [on_card(card, shape) for shape in (g.input_shape, g.kernel_shape, (8, 8))]
    with caplog.at_level(logging.DEBUG, "fastsepconv.cuda"):
        cuda.separable_forward(g, *arrays, None, on_card(card, g.output_shape))
    assert [message.split(" on ")[0] for message in caplog.messages] == [
        "depthwise_forward[float32,float32,float32] of the plain tier",
        "pointwise_forward[float32,small] of the fast tier",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("FASTSEPCONV_CUDA_TIER", "quick", "plain, fast"), ("FASTSEPCONV_TF32", "yes", "0, 1")],
)
def test_a_setting_that_names_nothing_is_told(card, monkeypatch, variable, value, expected):
    from fastsepconv.kernels.cuda import tiers

    monkeypatch.setenv(variable, value)
    message = f"environment variable `{variable}`. Expected one of {expected}. Received: {variable}={value}"
    arrays = [on_card(card, shape) for shape in ((4, 8), (8, 8), (4, 8))]
    for use in (lambda: cuda.pointwise_forward(*arrays[:2], None, arrays[2]), tiers.explain):
        with pytest.raises(ValueError, match=message):
            use()


def test_what_calls_may_use_is_told_in_words(card, monkeypatch):
    from fastsepconv.kernels.cuda import tiers

    monkeypatch.setenv("FASTSEPCONV_TF32", "1")
    assert tiers.explain().startswith("fast kernels where they serve (float32 as TF32), else plain kernels for every")
    assert tiers.explain().endswith("; the README tells which have run on a card")
    monkeypatch.delenv("FASTSEPCONV_TF32")
    assert "three TF32 products" in tiers.explain()
    monkeypatch.delenv("FASTSEPCONV_CUDA_TIER")
    assert tiers.explain().startswith("plain kernels for every operation, and FASTSEPCONV_CUDA_TIER=fast asks for")


def test_arguments_of_a_product_reach_the_driver(card):
    x, kernel, bias, y = (on_card(card, shape, "bfloat16") for shape in ((30, 16), (16, 24), (24,), (30, 24)))
    card.calls.clear()
    cuda.pointwise_forward(x, kernel, bias, y, (0.0, 6.0))
    shared = 4 * (64 * 64 + 32 * 144)  # stages of 64 rows of x, 32 channels each, and of as many rows of the kernel
    assert card.launches == [{"grid": (1, 1, 1), "block": (128, 1, 1), "shared": shared, "stream": STREAM}]
    expected = [x.address, kernel.address, bias.address, y.address, 30, 24, 16, 1, 0.0, 6.0]
    assert values_at(card.parameters, "QQQQiiiiff") == expected
    assert not card.named("cuStreamSynchronize", "cuMemAllocAsync", "cuKernelSetAttribute")
    card.current = CONTEXT
    card.calls.clear()
    cuda.pointwise_forward(x, kernel, None, y)
    assert card.calls == ["cuCtxGetCurrent", "cuLaunchKernel"]
    assert values_at(card.parameters, "QQQQiiiiff")[2] == values_at(card.parameters, "QQQQiiiiff")[7] == 0


@pytest.mark.parametrize(("capability", "tile"), [
    ((8, 0), "narrow"),
    ((8, 9), "narrow"),
    ((9, 0), "warpgroups192"),
    ((10, 0), "narrow"),
    ((12, 1), "narrow"),
])  # fmt: skip
def test_products_of_half_numbers_take_warpgroups_on_hopper_alone(card, ran, capability, tile):
    card.capability = capability
    x, kernel, y = (on_card(card, shape, "bfloat16") for shape in ((32 * 361, 728), (728, 728), (32 * 361, 728)))
    cuda.pointwise_forward(x, kernel, None, y)
    cuda.pointwise_backward(x, kernel, y, x, kernel, None)
    assert ran[0] == f"pointwise_forward[bfloat16,{tile}]"
    assert ran[1] == f"pointwise_input_gradient[bfloat16,{tile}]"
    assert ("warpgroups" in ran[2]) == (capability == (9, 0))
    if capability == (9, 0):
        shared = 1024 + 5 * 128 * (128 + 192)  # five stages of 128 bytes of x and of the kernel, on a period
        assert card.launches[0] == {"grid": (91 * 4, 1, 1), "block": (256, 1, 1), "shared": shared, "stream": STREAM}
        assert shared in card.allowed.values()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_tf32_takes_warpgroups_on_hopper_alone_forward_from_a_transpose(card, ran, monkeypatch, capability):
    monkeypatch.setenv("FASTSEPCONV_TF32", "1")
    card.capability = capability
    x, kernel, y = (on_card(card, shape) for shape in ((32 * 361, 728), (728, 736), (32 * 361, 736)))
    arrays = set(card.memory)
    cuda.pointwise_forward(x, kernel, None, y)
    cuda.pointwise_backward(x, kernel, y, x, kernel, None)
    assert set(card.memory) == arrays
    tile = "warpgroups192" if capability == (9, 0) else "narrow"
    transposed = ["transpose[tf32]"] * (capability == (9, 0))
    assert ran[:-2] == [*transposed, f"pointwise_forward[tf32,{tile}]", f"pointwise_input_gradient[tf32,{tile}]"]
    assert ran[-2].startswith("pointwise_kernel_gradient[tf32,") and "warpgroups" not in ran[-2]
    if transposed:
        squares = {"grid": (23 * 23, 1, 1), "block": (256, 1, 1), "shared": 32 * 33 * 4, "stream": STREAM}
        assert card.launches[0] == squares
        assert card.launches[1]["grid"] == (91 * 4, 1, 1)
        assert card.launches[1]["shared"] == 1024 + 5 * 128 * (128 + 192)


def test_a_product_reads_the_transpose_that_was_made_for_it_in_memory_of_the_call(card, monkeypatch):
    """As a caller lends it, which a graph of launches keeps; a call that is refused leaves nothing behind."""
    from fastsepconv.kernels.cuda import memory, tiles

    monkeypatch.setenv("FASTSEPCONV_TF32", "1")
    monkeypatch.setattr(tiles, "pointwise", lambda *arguments: tiles.WARPGROUP_POINTWISE["tf32"][0])
    x, kernel, y = (on_card(card, shape) for shape in ((30, 16), (16, 24), (30, 24)))
    lent, asked = on_card(card, (16, 24)).address, []
    read = []
    launch = card.cuLaunchKernel
    monkeypatch.setattr(card, "cuLaunchKernel", lambda *told: (read.append(values_at(told[9], "QQ")), launch(*told))[1])
    with memory.room_from(lambda size: asked.append(size) or lent):
        card.calls.clear()
        cuda.pointwise_forward(x, kernel, None, y)
    assert asked == [16 * 24 * 4] and not card.named("cuMemAllocAsync", "cuStreamSynchronize")
    assert read == [[kernel.address, lent], [x.address, lent]]
    before = set(card.memory)
    for refused in ("cuMemAllocAsync", "cuLaunchKernel"):
        for which in range(1, 2 + (refused == "cuLaunchKernel")):
            card.calls.clear()
            card.fails = {(refused, which): card.CUresult.CUDA_ERROR_OUT_OF_MEMORY}
            with pytest.raises(RuntimeError, match=r"has no room for the|Launching .* failed"):
                cuda.pointwise_forward(x, kernel, None, y)
            assert set(card.memory) == before


def test_arguments_of_a_window_reach_the_driver(card):
    g = resolve((2, 9, 41, 24), (3, 3, 24, 1), (2, 2), "same", (1, 1))
    x, kernel, y = (on_card(card, shape) for shape in (g.input_shape, g.kernel_shape, g.output_shape))
    cuda.depthwise_forward(g, x, kernel, None, y)
    rows, segments, lanes = 2 * 5, 2, 8  # 21 pixels a row; 6 threads hold the channels, of 8 that stand side by side
    blocks = segments * -(-rows // (128 // lanes))
    assert card.launches == [{"grid": (blocks, 1, 1), "block": (128, 1, 1), "shared": 0, "stream": STREAM}]
    expected = [
        x.address, kernel.address, 0, y.address, rows, 9, 41, 24, 5, 21, 1, 1, 6, segments, 3, 0, -INFINITY, INFINITY,
    ]  # fmt: skip
    assert values_at(card.parameters, "QQQQ" + "i" * 12 + "ff") == expected


def test_a_kernel_asks_for_as_much_shared_memory_as_any_launch_of_it_needs(card, monkeypatch):
    from fastsepconv.kernels.cuda import fast_separable

    monkeypatch.setattr(fast_separable, "MID_COST", INFINITY)
    asked = []
    for channels in (64, 256, 128, 512, 512):
        g = resolve((1, 4, 5, channels), (3, 3, channels, 1), (1, 1), "same", (1, 1))
        shapes = g.input_shape, g.kernel_shape, (channels, 16), (1, 4, 5, 16)
        x, depthwise, pointwise, y = (on_card(card, shape, "float16") for shape in shapes)
        cuda.separable_forward(g, x, depthwise, pointwise, None, y)
        shared = card.launches[-1]["shared"]
        assert shared <= max(48 * 1024, *card.allowed.values())
        asked.append(len(card.named("cuKernelSetAttribute")))
    assert asked == [1, 2, 2, 3, 3]
    assert len(card.allowed) == len(card.named("cuLibraryGetKernel")) == 1


def pointwise(double, rows=40, channels=16, filters=24, dtypes=("float32",) * 4, shifts=(0, 0, 0, 0)):
    shapes = (rows, channels), (channels, filters), (filters,), (rows, filters)
    arrays = itertools.starmap(on_card, zip([double] * 4, shapes, dtypes, shifts, strict=True))
    cuda.pointwise_forward(*arrays)


PLAIN_POINTWISE = {
    "float64": {"dtypes": ("float64",) * 4},
    "a mixture of elements": {"dtypes": ("float32", "float16", "float16", "float16")},
    "half numbers in an odd row": {"dtypes": ("bfloat16",) * 4, "channels": 15},
    **{f"array {i} off its alignment": {"shifts": tuple(4 * (i == j) for j in range(4))} for i in range(4)},
}


@pytest.mark.parametrize("call", PLAIN_POINTWISE.values(), ids=PLAIN_POINTWISE.keys())
def test_products_that_are_the_plain_kernels(card, ran, call):
    pointwise(card)
    assert ran.pop() == "pointwise_forward[float32,small]"
    pointwise(card, **call)
    assert ran.pop().count(",") == 2


@pytest.mark.parametrize(("batch", "size", "channels", "filters", "fused"), [
    (1, 19, 728, 728, False),
    (32, 19, 728, 728, True),
    (128, 19, 728, 728, True),
    (32, 10, 1024, 1536, False),
    (128, 10, 1536, 2048, False),
])  # fmt: skip
def test_both_steps_are_one_kernel_where_that_costs_less(card, batch, size, channels, filters, fused):
    from fastsepconv.kernels.cuda import driver, fast_separable

    stream = driver.Stream(STREAM, driver.device(0))
    g = resolve((batch, size, size, channels), (3, 3, channels, 1), (1, 1), "same", (1, 1))
    assert (fast_separable._fused(g, filters, "bfloat16", stream) is not None) is fused
    assert fast_separable._fused(g, filters, "float32", stream) is None


PLAIN_WINDOWS = {  # image, taps, multiplier, strides, dilation
    "a multiplier": ((1, 5, 5, 8), (3, 3), 2, (1, 1), (1, 1)),
    "dilation": ((1, 5, 5, 8), (3, 3), 1, (1, 1), (1, 2)),
    "five taps": ((1, 5, 5, 8), (5, 5), 1, (1, 1), (1, 1)),
    "stride 3": ((1, 5, 5, 8), (3, 3), 1, (3, 3), (1, 1)),
    "unequal strides": ((1, 5, 5, 8), (3, 3), 1, (2, 1), (1, 1)),
    "odd channels": ((1, 5, 5, 7), (3, 3), 1, (1, 1), (1, 1)),
}


@pytest.mark.parametrize("call", PLAIN_WINDOWS.values(), ids=PLAIN_WINDOWS.keys())
def test_windows_that_are_the_plain_kernels(card, ran, call):
    image, taps, multiplier, strides, dilation = call
    g = resolve(image, (*taps, image[3], multiplier), strides, "same", dilation)
    x, kernel, y = (on_card(card, shape) for shape in (g.input_shape, g.kernel_shape, g.output_shape))
    cuda.depthwise_forward(g, x, kernel, None, y)
    cuda.depthwise_backward(g, x, kernel, y, x, kernel, None)
    assert [name.partition("[")[0] for name in ran] == [
        "depthwise_forward", "depthwise_d_x", "depthwise_d_kernel", "part_sums",
    ]  # fmt: skip
    assert ran[0] == "depthwise_forward[float32,float32,float32]"


def test_sizes_that_cannot_be_counted_in_32_bits_are_the_plain_kernels(card):
    from fastsepconv.kernels.cuda import fast_depthwise, fast_pointwise

    assert fast_pointwise.fits(2**27 - 2**6, 16, 8, "float32")
    assert not fast_pointwise.fits(2**27, 16, 8, "float32")
    assert not fast_pointwise.fits(1, 2**24, 8, "float32")
    assert not fast_pointwise.fits(0, 16, 8, "float32")
    for batch, served in ((2**20 - 1, True), (2**20, False), (0, False)):
        g = resolve((batch, 16, 16, 8), (3, 3, 8, 1), (1, 1), "same", (1, 1))
        assert (fast_depthwise.forward_tile(g, "float32") is not None) is served


def test_whatever_fits_is_counted_in_32_bits_by_every_kernel(card):
    """Rows of one number, as many as there may be: the places that a kernel counts past the last one are positive."""
    from fastsepconv.kernels.cuda import fast_kernels, fast_pointwise, tiles

    rows = fast_kernels.MOST_ELEMENTS
    assert fast_pointwise.fits(rows, 1, 1, "float32") and not fast_pointwise.fits(2**31 - 1, 1, 1, "float32")
    for element, found in tiles.POINTWISE.items():
        for tile in found:
            stage = 64 // tiles.ITEMSIZE[element]  # places of the depth
            share = tiles.kernel_gradient_share(tile, 1, 1, rows)
            assert rows + tile.stages * stage + max(tile.rows, tile.columns) < 2**31
            assert -(-rows // share) <= 65535, "of a grid's second size there is no more"


def test_an_empty_batch_is_the_plain_kernels(card, ran):
    x, kernel, dy, d_kernel = (on_card(card, shape) for shape in ((0, 16), (16, 8), (0, 8), (16, 8)))
    cuda.pointwise_backward(x, kernel, dy, x, d_kernel, None)
    assert ran == ["pointwise_d_kernel[float32,float32]", "part_sums[float32,float32]"]


G = resolve((2, 5, 6, 16), (3, 3, 16, 1), (1, 1), "same", (1, 1))
CALLS = {
    "depthwise_forward": ((G,), [G.input_shape, G.kernel_shape, (16,), G.output_shape]),
    "depthwise_backward": ((G,), [G.input_shape, G.kernel_shape, G.output_shape, None, G.kernel_shape, (16,)]),
    "pointwise_forward": ((), [(60, 16), (16, 24), (24,), (60, 24)]),
    "pointwise_backward": ((), [(60, 16), (16, 24), (60, 24), (60, 16), (16, 24), (24,)]),
    "separable_forward": ((G,), [G.input_shape, G.kernel_shape, (16, 24), (24,), (2, 5, 6, 24)]),
    "separable_backward": (
        (G,),
        [
            G.input_shape, G.kernel_shape, (16, 24), (2, 5, 6, 24),
            G.input_shape, G.kernel_shape, (16, 24), (24,),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", ["cuMemAllocAsync", "cuLaunchKernel"])
@pytest.mark.parametrize("operation", CALLS)
def test_whatever_is_refused_leaves_nothing_behind(card, ran, operation, refused):
    before, shapes = CALLS[operation]
    status = {"cuMemAllocAsync": "CUDA_ERROR_OUT_OF_MEMORY", "cuLaunchKernel": "CUDA_ERROR_INVALID_VALUE"}[refused]
    arrays = [shape and np.ones(shape, np.float32) for shape in shapes]
    call = getattr(cuda, operation)
    call(*before, *arrays)
    count = card.calls.count(refused)
    assert count >= 1 and not card.memory
    for which in range(1, count + 1):
        card.calls.clear()
        card.fails = {(refused, which): getattr(card.CUresult, status)}
        with pytest.raises(RuntimeError, match=r"has no room for the|Launching .* failed"):
            call(*before, *arrays)
        assert not card.memory
    assert any(name.count(",") == 1 for name in ran)


def test_every_kernel_of_the_tables_has_a_name_of_its_own_and_fits_the_smallest_card(toolkit):
    from fastsepconv.kernels.cuda import fast_kernels, pointwise_tensor, tiles

    for dtype, found in [*tiles.POINTWISE.items(), *tiles.WARPGROUP_POINTWISE.items()]:
        for tile, maker in [(one, maker) for one in found for maker in pointwise_tensor.factories(dtype, one)]:
            kernel, launch = fast_kernels.made(maker, dtype, tile)
            assert kernel.name.endswith(f"[{dtype},{tile.name}]")
            sizes = (1, 1, 1, 32) if maker is pointwise_tensor.kernel_gradient else (1, 1)
            least = HOPPER_SHARED if tile.architecture == tiles.HOPPER else LEAST_SHARED
            assert launch(*sizes).shared_bytes <= least


def test_fast_kernels_are_compiled_for_the_least_capability_and_assembled_for_the_card(double, monkeypatch):
    from types import SimpleNamespace

    from fastsepconv.kernels.cuda import binaries, fast_kernels, partial_sums, pointwise_tensor, tiles

    # Numba asks the card for its capability when it types a device function, and uses it for nothing else.
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0)))
    small = tiles.POINTWISE["bfloat16"][2]
    for factory, which in ((partial_sums.add_partials, ("bfloat16",)), (pointwise_tensor.forward, ("bfloat16", small))):
        kernel, _ = fast_kernels.made(factory, *which)
        assert ".target sm_80" in binaries.ptx(kernel, (9, 0))
        compiled = binaries.get(kernel, (9, 0))
        assert compiled.code.startswith(b"\x7fELF") and kernel.function.__name__ in compiled.entry
        assert binaries.get(kernel, (9, 0)) == compiled


def test_kernels_of_warpgroups_are_compiled_and_assembled_for_hopper(double, monkeypatch):
    from types import SimpleNamespace

    from fastsepconv.kernels.cuda import binaries, fast_kernels, pointwise_tensor, tiles

    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0)))
    kernel, _ = fast_kernels.made(pointwise_tensor.forward, "float16", tiles.WARPGROUP_POINTWISE["float16"][-1])
    assert ".target sm_90a" in binaries.ptx(kernel, (9, 0))
    assert binaries.target(kernel, (9, 0)) == "sm_90a"
    compiled = binaries.get(kernel, (9, 0))
    assert compiled.code.startswith(b"\x7fELF") and kernel.function.__name__ in compiled.entry
    assert binaries.get(kernel, (9, 0)) == compiled
