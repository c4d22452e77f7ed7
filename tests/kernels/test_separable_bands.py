"""The backward pass in bands of lines, called directly: it is meant for large images, and has to be right for any."""

from __future__ import annotations

import numpy as np
import pytest

from fastsepconv.kernels import reference
from fastsepconv.kernels.cpu import multiplier, separable_bands
from fastsepconv.kernels.cpu.images import images_at_once
from fastsepconv.kernels.geometry import resolve
from tests.tolerances import assert_close

from .test_cpu import Buffers, drawn_geometry

NAMES = ("x", "depthwise", "pointwise")


def drawn(seed: int):
    """(geometry, filters): ragged, the batch not empty, no multiplier."""
    rng = np.random.default_rng(seed)
    g = multiplier.single.py_func(drawn_geometry(rng))._replace(batch=int(rng.integers(1, 5)))
    return g, int(rng.integers(1, 80)), rng


def gradients(g, filters: int, dtype: str, inputs: list[np.ndarray], wanted=NAMES, threads: int = 2) -> dict:
    """Those wanted, in poisoned buffers."""
    buffers = Buffers(dtype)
    x, depthwise_kernel, pointwise_kernel, dy = map(buffers.input, inputs)
    found = {
        name: buffers.output(like.shape)
        for name, like in zip(NAMES, (x, depthwise_kernel, pointwise_kernel), strict=True)
        if name in wanted
    }
    addresses = [found[name].ctypes.data if name in found else 0 for name in NAMES]
    had_memory = separable_bands.backward(
        np.dtype(dtype).type, g, filters, x.ctypes.data, depthwise_kernel.ctypes.data, pointwise_kernel.ctypes.data,
        dy.ctypes.data, *addresses, threads,
    )  # fmt: skip
    assert had_memory
    buffers.check()
    return found


def inputs_of(g, filters: int, dtype: str, rng) -> list[np.ndarray]:
    shapes = (g.input_shape, g.kernel_shape, (g.channels, filters), (*g.output_shape[:3], filters))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def hold(g, filters: int, dtype: str, rng, threads: int = 2) -> None:
    """All gradients against the reference, which has that of the bias too."""
    inputs = inputs_of(g, filters, dtype, rng)
    found = gradients(g, filters, dtype, inputs, threads=threads)
    for name, expected in zip(NAMES, reference.separable_backward(g, *inputs), strict=False):
        assert_close(f"d_{name}", found[name], expected)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_reference(seed):
    g, filters, rng = drawn(seed)
    dtype, threads = ("float32", "float64")[seed % 2], 1 + seed // 2 % 2
    hold(g, filters, dtype, rng, threads)


@pytest.mark.parametrize("seed", range(60, 66))
def test_computes_what_is_wanted_and_the_same_on_any_number_of_threads(seed):
    g, filters, rng = drawn(seed)
    inputs = inputs_of(g, filters, "float32", rng)
    whole = gradients(g, filters, "float32", inputs)
    for wanted, threads in (("x",), 2), (("depthwise",), 2), (("pointwise",), 2), (NAMES[:2], 1), (NAMES, 1):
        found = gradients(g, filters, "float32", inputs, wanted, threads)
        assert set(found) == set(wanted)
        for name, array in found.items():
            np.testing.assert_array_equal(array, whole[name])


@pytest.mark.parametrize(
    ("dtype", "filters", "shape"),
    [
        pytest.param("float32", 512, (1, 61, 60, 20), id="rows of dy collide"),
        pytest.param("float64", 256, (1, 61, 60, 20), id="rows of dy collide, float64"),
        pytest.param("float64", 9, (5, 41, 43, 120), id="parts of two images, the last of one"),
    ],
)
def test_equals_the_reference_where_certain_sizes_matter(dtype, filters, shape):
    g, rng = resolve(shape, (3, 3, shape[-1], 1), (1, 1), "same", (1, 1)), np.random.default_rng(0)
    assert shape[0] == 1 or images_at_once(np.float64, g, separable_bands.D_MID_BYTES) == 2
    hold(g, filters, dtype, rng)


def lines_that_reach(g) -> list[set[int]]:
    """For each line of x, counted over all images, the output lines that are made of it."""
    reached = [set() for _ in range(g.batch * g.height)]
    for line in range(g.batch * g.out_height):
        n, top = line // g.out_height, line % g.out_height * g.stride_height - g.pad_top
        for h in (top + tap * g.dilation_height for tap in range(g.kernel_height)):
            if 0 <= h < g.height:
                reached[n * g.height + h].add(line)
    return reached


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("plain", [False, True])
def test_a_seam_holds_the_lines_that_need_both_sides(seed, plain):
    """And no others, where a line of x is made of output lines side by side."""
    g, _, _ = drawn(seed)
    if plain:
        g = resolve(g.input_shape, g.kernel_shape, (1, 1), "same", (1, 1))
    reached = lines_that_reach(g)
    for line in range(g.batch * g.out_height + 1):
        complete = separable_bands.complete_lines.py_func(g, line)
        first = separable_bands.first_own_line.py_func(g, line)
        assert all(max(lines, default=-1) < line for lines in reached[:complete])
        assert all(min(lines, default=line) >= line for lines in reached[first:])
        assert not plain or all(min(lines) < line <= max(lines) for lines in reached[complete:first])
    assert complete == len(reached)
