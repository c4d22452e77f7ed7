"""Which ways through the CPU kernels a case takes, told from its sizes by the kernels' own rules.

The rules that are functions are called, at the tile in use; those that stand in the middle of a loop are repeated here.
"""

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.np.numpy_support import from_dtype

from fastsepconv import activations, layout
from fastsepconv.kernels import cpu
from fastsepconv.kernels.cpu import (
    amx,
    amx_gemm,
    blocking,
    depthwise,
    depthwise_gradients,
    depthwise_line,
    gemm,
    gemm_tile,
    images,
    multiplier,
    pointwise,
    separable,
    separable_bands,
    threads,
    tiles,
)
from fastsepconv.kernels.cpu.correlation_tiles import CORRELATED_TAPS
from fastsepconv.kernels.cpu.depthwise_tiles import SLIDING_TAPS, WIDE_SLIDING_TAPS, sliding_span
from fastsepconv.kernels.cpu.memory import share
from fastsepconv.kernels.cpu.simd import BFLOAT16
from fastsepconv.kernels.geometry import Geometry
from tests.grid.cases import Case

TILE = tiles.CHOSEN


def paths(case: Case) -> set[str]:
    """The names of the paths, forward and backward."""
    dtype, forward_dtype = _dtypes(case)
    workers = min(case.threads, threads.get_num_threads())
    found = {"pool" if workers > 1 else "serial"}
    if case.batch == 0:
        return found | {"empty batch"}
    pixels = case.batch * case.image[0] * case.image[1]
    if case.operation in ("pointwise", "pointwise_depthwise"):
        found |= _forward_paths(forward_dtype, pixels, case.channels, case.filters, case.filters, 1, workers)
        found |= _forward_paths(dtype, pixels, case.filters, case.channels, 1, case.filters, workers)
        found |= _gradient_paths(dtype, pixels, case.channels, case.filters)
    if case.operation == "pointwise":
        return found
    g = multiplier.single.py_func(case.geometry)
    found.add("repeated channels" if case.depth_multiplier > 1 else "plain channels")
    found |= _depthwise_paths(forward_dtype, g)
    if case.operation == "depthwise_pointwise":
        found |= _forward_paths(forward_dtype, _pixels(g), g.channels, case.filters, case.filters, 1, workers)
        return found | _separable_paths(dtype, g, case.filters, workers)
    found |= {"depthwise: past the caches"} if _past_caches(forward_dtype, g.output_shape) else set()
    found |= {"depthwise gradients: past the caches"} if _past_caches(dtype, g.input_shape) else set()
    return found | _gradient_parts(dtype, g)


def _dtypes(case: Case) -> tuple[type, type]:
    """What kernels are handed backward, and forward."""
    dtype = layout.working_dtype(np.dtype(case.dtype))
    native = case.dtype in cpu.FORWARD_HALVES and not (case.by_arrays and activations.get(case.activation)[1])
    return dtype.type, BFLOAT16 if native else dtype.type


def _pixels(g: Geometry) -> int:
    return g.batch * g.out_height * g.out_width


def _past_caches(dtype, shape) -> bool:
    return bool(gemm.past_caches(dtype, shape[0] * shape[1] * shape[2], shape[3], 0))


def _separable_paths(dtype, g: Geometry, filters: int, workers: int) -> set[str]:
    """Of the way back through the fused operation."""
    if separable_bands.wanted(dtype, g, filters):
        at_once = images.images_at_once(dtype, g, separable_bands.D_MID_BYTES)
        found = {"backward in bands: past the caches"} if _past_caches(dtype, g.input_shape) else set()
        found |= {"backward in bands", f"backward in bands: {'parts' if at_once < g.batch else 'whole batch'}"}
        groups, band_bytes = depthwise_gradients.GRADIENT_GROUPS, separable_bands.BAND_BYTES
        return found | _lines_at_once(dtype, g._replace(batch=at_once), g.channels, groups, band_bytes)
    at_once = images.images_at_once(dtype, g, separable.D_MID_BYTES)
    part = at_once * _pixels(g) // g.batch
    found = {"backward in parts" if at_once < g.batch else "backward at once"}
    found |= _forward_paths(dtype, part, filters, g.channels, 1, filters, workers, kept=at_once < g.batch)
    found |= _gradient_parts(dtype, g._replace(batch=at_once))
    if at_once < g.batch and depthwise_gradients.gradient_parts(dtype, g._replace(batch=at_once))[0] == 1:
        found.add("depthwise gradients: one group of lines, several parts of the batch")
    return found | _gradient_paths(dtype, part, g.channels, filters)


def _lanes(dtype) -> int:
    return TILE.vector_bytes // (4 if dtype is BFLOAT16 else dtype(0).itemsize)


def _depthwise_paths(dtype, g: Geometry) -> set[str]:
    found = set()
    taps = depthwise_gradients.taps_together(g.kernel_width, g.dilation_width, g.stride_width)
    columns = [depthwise_gradients._tap_columns(g, tap) for tap in range(1, taps, CORRELATED_TAPS)]
    together = sum(first < last for first, last in columns)
    found |= {"depthwise gradient: taps together"} if together else set()
    found |= {"depthwise gradient: taps together twice"} if together > 1 else set()
    found |= {"depthwise gradient: a tap at a time"} if taps < g.kernel_width else set()
    rows = [depthwise_gradients.whole_lines(g, r, 0, g.out_height) for r in range(0, g.kernel_height, CORRELATED_TAPS)]
    whole = sum(first < last for first, last in rows) if together else 0
    found |= {"depthwise gradient: rows together"} if whole else set()
    found |= {"depthwise gradient: rows together twice"} if whole > 1 else set()
    found |= {"depthwise: several channel blocks"} if g.channels > depthwise.forward_block(dtype, g) else set()
    interleaved = depthwise_line.interleaved(g.kernel_width, g.dilation_width, g.stride_width)
    step = interleaved * g.stride_width
    found |= {"depthwise: lines interleaved"} if 1 < interleaved <= g.out_width else set()
    slides, lanes = depthwise_line.slides(g.kernel_width, g.dilation_width, step), _lanes(dtype)
    for line in range(min(interleaved, g.out_width)):
        count, origin = -(-(g.out_width - line) // interleaved), line * g.stride_width - g.pad_left
        taps = [
            depthwise_line.inside(origin + tap * g.dilation_width, step, count, g.width)
            for tap in range(g.kernel_width)
        ]
        found |= _sliding_paths(taps, count) if slides else _tile_paths(taps, count)
    if slides:
        span = sliding_span(g.kernel_width, TILE.slides[0]) * lanes
        found |= {"depthwise sliding: whole vectors"} if g.channels >= span else set()
        found |= {"depthwise sliding: vectors left over"} if g.channels % span else set()
    else:
        span = TILE.span * lanes
        found |= {"depthwise: vectors together"} if g.channels >= span else set()
        found |= {"depthwise: one vector"} if g.channels % span >= lanes else set()
        found |= {"depthwise: part of a vector"} if g.channels % lanes else set()
    return found


def _tile_paths(taps: list, count: int) -> set[str]:
    """How the pixels of a line are taken where they do not slide, `taps` being where each tap is inside the image."""
    inner = max(0, taps[-1][1] - taps[0][0])
    found = {"depthwise: pixels together"} if inner >= TILE.pixels else set()
    found |= {"depthwise: inner pixels left over"} if inner % TILE.pixels else set()
    return found | ({"depthwise: border pixels"} if inner < count else set())


def _sliding_paths(taps: list, count: int) -> set[str]:
    """How they are taken where they do."""
    (first, last), wide = taps[len(taps) // 2], len(taps) > SLIDING_TAPS
    found, left = set(), last - first
    while left > 0:
        pixels = depthwise_line.sliding_pixels(left)
        found.add(f"depthwise sliding: {f'{len(taps)} taps, ' if wide else ''}{pixels} pixels")
        left -= pixels
    found |= {"depthwise sliding: first tap cut"} if first < last and first < taps[0][0] else set()
    found |= {"depthwise sliding: last tap cut"} if first < last and taps[-1][1] < last else set()
    return found | ({"depthwise sliding: middle tap outside"} if last - first < count else set())


def _gradient_parts(dtype, g: Geometry) -> set[str]:
    """How the gradients of the depthwise step are cut."""
    groups, parts = depthwise_gradients.gradient_parts(dtype, g)
    found = {f"depthwise gradients: {'several groups of lines' if groups > 1 else 'one group of lines'}"}
    found |= {"depthwise gradients: parts of the channels"} if parts > 1 else set()
    first, last = depthwise_gradients._channels_of(dtype, g, 0, parts)
    return found | _lines_at_once(dtype, g, last - first, groups, depthwise_gradients.BAND_BYTES)


def _lines_at_once(dtype, g: Geometry, channels: int, groups: int, band_bytes: int) -> set[str]:
    """How `depthwise_gradients` and `separable_bands` go through their groups of lines."""
    found, at_once = set(), depthwise_gradients.lines_at_once(dtype, g, channels, band_bytes)
    for group in range(groups):
        line, last = share(g.batch * g.out_height, group, groups)
        while line < last:
            images, count = depthwise_gradients.next_lines(g, line, last, at_once)
            found.add(f"depthwise gradient: {'whole images' if images else 'part of an image'}")
            line += count
    return found


def _forward_paths(
    dtype, rows: int, depth: int, filters: int, row_stride: int, column_stride: int, workers: int, kept: bool = False
) -> set[str]:
    """Of a product: y = x . kernel, or d_x = dy . kernel^T."""
    if _in_amx(dtype):
        return _amx_paths(dtype, rows, depth, filters, row_stride, column_stride, workers, kept)
    width = TILE.vectors * _lanes(dtype)
    packed = kept or bool(gemm._shares_panels(dtype, rows, depth, filters, row_stride, column_stride, workers))
    shares = blocking.shares(rows, workers, packed)
    row_parts = blocking.row_parts(dtype, rows, filters, shares)
    first, last, f_first, f_last = blocking.work(dtype, rows, filters, 0, shares)
    blocks = blocking.block_count(dtype, depth, last - first)
    left_over, found = (last - first) % blocking.TILE_ROWS, set()
    if packed:
        found.add("product: shared panels")
    else:
        if column_stride == 1 and filters >= width:
            found.add("product: panels packed in passing")
            collide = blocking.rows_collide(dtype, row_stride)
            found |= {"product: rows of the kernel collide"} if collide else set()
            found |= {"product: rows collide in several blocks"} if collide and blocks > 1 else set()
        if gemm.is_thin(dtype, rows, column_stride):
            found.add(f"product: {'several slabs' if depth > gemm.EARLY else 'one slab'}")
        elif column_stride == 1 and f_first + 2 * width <= min(filters, f_last):
            begin, end = blocking.block_range(dtype, first, last, blocks, 0)
            tiles, copies = gemm._copied_ahead(dtype, end - begin, depth)
            found |= {f"product: {'several rows' if copies > 1 else 'a row'} copied at once"} if tiles else set()
        if column_stride != 1 or filters % width:
            found.add("product: panels packed apart")
    if blocking.depth_parts(dtype, depth) > 1 and not gemm.is_thin(dtype, rows, column_stride):
        found.add(f"product: parts of the depth, panels {'shared' if packed else 'packed in passing'}")
    found |= {f"product: rows {'copied' if pointwise._copied(dtype, depth) else 'in place'}"}
    found |= {"product: several blocks"} if blocks > 1 else set()
    found |= {f"product: {'rows' if row_parts == shares else 'filters'} split"} if workers > 1 else set()
    found |= {"product: more shares than threads"} if shares > workers else set()
    found |= {"product: whole tile"} if rows >= blocking.TILE_ROWS and filters >= width else set()
    found |= {f"product: {blocking.tile_height(left_over)} rows left over"} if left_over else set()
    found |= {"product: last tile copied"} if blocking.tile_height(left_over) > left_over > 0 else set()
    found |= {"product: columns left over"} if filters % width else set()
    found |= {"product: products left over"} if gemm.products(dtype, depth) % gemm_tile.STRETCH else set()
    found |= {"product: two sums"} if depth > gemm_tile.SUMMED_AT_ONCE else set()
    found |= {"product: three sums"} if depth > 2 * gemm_tile.SUMMED_AT_ONCE else set()
    found |= {"product: past the caches"} if gemm.past_caches(dtype, rows, filters, 0) else set()
    return found


def _in_amx(dtype) -> bool:
    return bool(amx.terms_of(types.NumberClass(from_dtype(np.dtype(dtype)))))


def _amx_paths(
    dtype, rows: int, depth: int, filters: int, row_stride: int, column_stride: int, workers: int, kept: bool
) -> set[str]:
    """The same in AMX's registers."""
    packed = kept or bool(gemm._shares_panels(dtype, rows, depth, filters, row_stride, column_stride, workers))
    shares = blocking.shares(rows, workers, packed)
    row_parts = blocking.row_parts(dtype, rows, filters, shares)
    first, last, _, _ = blocking.work(dtype, rows, filters, 0, shares)
    name, left_over = np.dtype(dtype).name, (last - first) % amx.SIDE
    found = {f"AMX {name}: panels {'shared' if packed else 'packed in passing'}"}
    found |= {"AMX: rows side by side for the depth"} if column_stride != 1 else set()
    found |= {"AMX: several parts of the depth"} if amx_gemm.depth_parts(dtype, depth) > 1 else set()
    found |= {f"AMX {name}: step left over"} if depth % amx.STEP else set()
    found |= {f"AMX {name}: {'half a tile' if left_over <= amx.ROWS else 'a tile'} left over"} if left_over else set()
    found |= {f"AMX {name}: whole tile"} if rows >= amx.SIDE and filters >= amx.SIDE else set()
    found |= {f"AMX {name}: columns left over"} if filters % amx.SIDE else set()
    found |= {f"AMX {name}: several blocks"} if blocking.block_count(dtype, depth, last - first) > 1 else set()
    found |= {f"AMX: {'rows' if row_parts == shares else 'filters'} split"} if workers > 1 else set()
    found |= {"AMX: more shares than threads"} if shares > workers else set()
    found |= {"AMX: past the caches"} if gemm.past_caches(dtype, rows, filters, 0) else set()
    if dtype is BFLOAT16:
        copied = bool(pointwise._copied(dtype, depth))
        found.add(f"AMX: rows of bfloat16 {'copied' if copied else 'in place'}")
        found |= {"AMX: last rows copied"} if not copied and pointwise._reads_further(dtype, left_over) else set()
    return found


def _gradient_paths(dtype, rows: int, depth: int, filters: int) -> set[str]:
    if _in_amx(dtype):
        found = {"AMX gradient: several blocks"} if pointwise.gradient_blocks(rows) > 1 else set()
        found |= {"AMX gradient: columns left over"} if filters % amx.SIDE else set()
        return found | ({"AMX gradient: rows left over"} if depth % amx.SIDE else set())
    width = TILE.vectors * _lanes(dtype)
    found = {"product gradient: several blocks"} if pointwise.gradient_blocks(rows) > 1 else set()
    found |= {"product gradient: panels packed in passing"} if filters >= width else set()
    found |= {"product gradient: columns left over"} if filters % width else set()
    return found | ({"product gradient: rows left over"} if depth % blocking.TILE_ROWS else set())


def every_path() -> set[str]:
    """What a whole run has to take. On one core there is no pool, and nothing is split.

    Where AMX multiplies, the other products are left to float64, and to a run on another tile.
    """
    products, kind = (_AMX_PRODUCTS, "AMX") if TILE.matrices else (_PRODUCTS, "product")
    split = {"pool", f"{kind}: rows split", f"{kind}: filters split", f"{kind}: more shares than threads"}
    return (
        products
        | {f"depthwise sliding: {pixels} pixels" for pixels in TILE.slides}
        | {f"depthwise sliding: {taps} taps, {pixels} pixels" for taps in WIDE_SLIDING_TAPS for pixels in TILE.slides}
        | (split if threads.get_num_threads() > 1 else set())
        | {
            "serial",
            "empty batch",
            "plain channels",
            "repeated channels",
            "backward at once",
            "backward in parts",
            "backward in bands",
            "backward in bands: parts",
            "backward in bands: whole batch",
            "depthwise: lines interleaved",
            "depthwise: pixels together",
            "depthwise: inner pixels left over",
            "depthwise: border pixels",
            "depthwise: several channel blocks",
            "depthwise: vectors together",
            "depthwise: one vector",
            "depthwise: part of a vector",
            "depthwise sliding: first tap cut",
            "depthwise sliding: last tap cut",
            "depthwise sliding: middle tap outside",
            "depthwise sliding: whole vectors",
            "depthwise sliding: vectors left over",
            "depthwise gradient: taps together",
            "depthwise gradient: taps together twice",
            "depthwise gradient: a tap at a time",
            "depthwise gradient: rows together",
            "depthwise gradient: rows together twice",
            "depthwise: past the caches",
            "depthwise gradients: past the caches",
            "backward in bands: past the caches",
            "depthwise gradients: one group of lines",
            "depthwise gradients: one group of lines, several parts of the batch",
            "depthwise gradients: several groups of lines",
            "depthwise gradients: parts of the channels",
            "depthwise gradient: whole images",
            "depthwise gradient: part of an image",
        }
    )


_HEIGHTS = {blocking.tile_height(rows) for rows in range(1, blocking.TILE_ROWS)}
_PRODUCTS = {f"product: {height} rows left over" for height in _HEIGHTS} | {
    "product: products left over",
    "product: panels packed in passing",
    "product: panels packed apart",
    "product: a row copied at once",
    "product: several rows copied at once",
    "product: rows of the kernel collide",
    "product: rows collide in several blocks",
    "product: parts of the depth, panels shared",
    "product: parts of the depth, panels packed in passing",
    "product: one slab",
    "product: several slabs",
    "product: shared panels",
    "product: rows copied",
    "product: rows in place",
    "product: last tile copied",
    "product: several blocks",
    "product: whole tile",
    "product: columns left over",
    "product: two sums",
    "product: three sums",
    "product: past the caches",
    "product gradient: several blocks",
    "product gradient: panels packed in passing",
    "product gradient: columns left over",
    "product gradient: rows left over",
}
_AMX_PRODUCTS = {
    f"AMX {dtype}: {what}"
    for dtype in ("float32", "uint16")
    for what in (
        "panels shared",
        "panels packed in passing",
        "step left over",
        "half a tile left over",
        "a tile left over",
        "whole tile",
        "columns left over",
        "several blocks",
    )
} | {
    "AMX: rows side by side for the depth",
    "AMX: several parts of the depth",
    "AMX: past the caches",
    "AMX: rows of bfloat16 copied",
    "AMX: rows of bfloat16 in place",
    "AMX: last rows copied",
    "AMX gradient: several blocks",
    "AMX gradient: columns left over",
    "AMX gradient: rows left over",
}
