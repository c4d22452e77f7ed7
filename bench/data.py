"""The numbers a problem runs on, written once to files and read by every provider, so that all see the same bits."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from .problems import BACKWARD, BFLOAT16, Layer, Problem

Arrays = dict[str, np.ndarray]


def write(problem: Problem, folder: Path, seed: int = 0) -> None:
    """What goes in, as float32, of which a layer of bfloat16 has every number.

    A network's weights are left to the reference, which can build it.
    """
    rng = np.random.default_rng([seed, zlib.crc32(problem.name.encode())])
    if isinstance(problem, Layer):
        _write_layer(problem, folder, rng)
        return
    x = rng.standard_normal((problem.batch, *problem.image_shape), np.float32)
    labels = rng.integers(0, problem.classes, problem.batch)
    save(folder / "input", {"x": x, "labels": labels, "seed": np.array(seed)})


def _write_layer(layer: Layer, folder: Path, rng: np.random.Generator) -> None:
    """x, dy (for "backward") and each weight set, in the size that keeps y near 1."""
    shapes = {"x": (layer.batch, layer.size, layer.size, layer.channels)}
    if layer.mode == BACKWARD:
        shapes["dy"] = (layer.batch, layer.output_size, layer.output_size, layer.filters)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    sets = [{key: _weight(rng, shape) for key, shape in layer.weight_shapes.items()} for _ in range(layer.weight_sets)]
    for name, part in (("input", arrays), *((f"weights{index}", weights) for index, weights in enumerate(sets))):
        save(folder / name, {key: _rounded(array) for key, array in part.items()} if layer.dtype == BFLOAT16 else part)


def _rounded(array: np.ndarray) -> np.ndarray:
    """float32 to the nearest number of bfloat16, which is the upper half of its bits."""
    bits = array.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _weight(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return rng.standard_normal(shape, np.float32)
    taps_h, taps_w, channels, outputs_a_channel = shape
    fan_in = taps_h * taps_w if outputs_a_channel == 1 else channels
    return rng.standard_normal(shape, np.float32) / np.float32(fan_in**0.5)


def load_input(folder: Path) -> Arrays:
    return load(folder / "input")


def load_weights(layer: Layer, folder: Path) -> list[Arrays]:
    """One dict of weights a set, in the order of `layer.weight_shapes`."""
    sets = [load(folder / f"weights{index}") for index in range(layer.weight_sets)]
    return [{name: arrays[name] for name in layer.weight_shapes} for arrays in sets]


def save(folder: Path, arrays: Arrays) -> None:
    """One .npy a name, in a new folder; bfloat16, which not every NumPy can read, as float32."""
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.float32) if array.dtype.name == BFLOAT16 else array)


def load(folder: Path) -> Arrays:
    """Every array of a folder. Raises FileNotFoundError where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}
