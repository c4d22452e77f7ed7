"""What tf.keras's layers compute, written down, for machines without TensorFlow: `python -m tests.goldens` writes it.

Inputs are multiples of 1/8 that every dtype holds exactly; outputs and gradients are those of float64 layers on the
CPU. `goldens.npz` holds arrays named `case/name`: x, the kernels, the bias, dy, y, and a gradient `d_` for each input.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("goldens.npz")
# (layer, image N,H,W,C, arguments of the layer). The window's arguments stand for those of the array API as well.
CASES = {
    "separable, valid": ("SeparableConv2D", (2, 6, 5, 3), {"filters": 4}),
    "separable, same": (
        "SeparableConv2D", (2, 7, 6, 3),
        {"filters": 5, "kernel_size": (3, 2), "padding": "same", "depth_multiplier": 2},
    ),
    "separable, strides": ("SeparableConv2D", (2, 9, 8, 16), {"filters": 24, "padding": "same", "strides": (2, 2)}),
    "separable, dilation": (
        "SeparableConv2D", (1, 9, 10, 5), {"filters": 7, "padding": "same", "dilation_rate": (2, 2)},
    ),
    "separable, aligned": ("SeparableConv2D", (2, 9, 9, 32), {"filters": 64, "padding": "same"}),
    "separable, ragged": ("SeparableConv2D", (1, 3, 3, 91), {"filters": 104, "padding": "same"}),
    "depthwise, same": ("DepthwiseConv2D", (2, 7, 6, 5), {"padding": "same", "depth_multiplier": 2}),
    "depthwise, aligned": ("DepthwiseConv2D", (2, 10, 9, 32), {"padding": "same"}),
    "depthwise, strides": ("DepthwiseConv2D", (2, 9, 9, 16), {"kernel_size": (5, 5), "strides": (2, 2)}),
    "pointwise": ("Conv2D", (2, 4, 5, 7), {"filters": 9, "kernel_size": (1, 1)}),
    "pointwise, aligned": ("Conv2D", (2, 8, 8, 64), {"filters": 32, "kernel_size": (1, 1)}),
}  # fmt: skip
KINDS = {"SeparableConv2D": "separable", "DepthwiseConv2D": "depthwise", "Conv2D": "pointwise"}


def kind(case: str) -> str:
    return KINDS[CASES[case][0]]


def window(case: str) -> dict:
    """The arguments of the array API's function."""
    arguments = CASES[case][2]
    return {name: arguments[name] for name in ("strides", "padding", "dilation_rate") if name in arguments}


def by_keras(case: str) -> dict[str, np.ndarray]:
    """A case's arrays, as tf.keras computes them now."""
    import keras
    import tensorflow as tf

    layer_name, image, arguments = CASES[case]
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    layer = getattr(keras.layers, layer_name)(**{"kernel_size": (3, 3), **arguments}, dtype="float64")
    layer.build(image)
    layer.set_weights([_numbers(rng, weight.shape) for weight in layer.weights])
    x = tf.constant(_numbers(rng, image))
    sources = [x, *(weight.value for weight in layer.weights)]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    dy = _numbers(rng, y.shape)
    gradients = tape.gradient(y, sources, output_gradients=tf.constant(dy))
    names = ["x", *_WEIGHTS[kind(case)]]
    arrays = {name: source.numpy() for name, source in zip(names, sources, strict=True)}
    found = {f"d_{name}": gradient.numpy() for name, gradient in zip(names, gradients, strict=True)}
    return {**arrays, "dy": dy, "y": y.numpy(), **found}


_WEIGHTS = {
    "separable": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "depthwise": ("depthwise_kernel", "bias"),
    "pointwise": ("pointwise_kernel", "bias"),
}


def _numbers(rng: np.random.Generator, shape) -> np.ndarray:
    return rng.integers(-16, 17, tuple(shape)) / 8


def load(case: str) -> dict[str, np.ndarray]:
    """A case's arrays, as they were written down."""
    with np.load(FILE) as file:
        return {name.partition("/")[2]: file[name] for name in file.files if name.partition("/")[0] == case}


def write() -> None:
    arrays = {f"{case}/{name}": array for case in CASES for name, array in by_keras(case).items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    write()
