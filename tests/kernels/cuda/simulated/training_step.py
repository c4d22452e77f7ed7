"""A training step of the tutorial's Xception, its whole topology with few channels, on whichever backend Keras has."""

from __future__ import annotations

import sys

import keras
import numpy as np

import fastsepconv
from fastsepconv.models import pointwise_then_depthwise, xception

FILTERS = {"ENTRY_FILTERS": (2, 4, 6), "MIDDLE_FILTERS": 6, "EXIT_FILTERS": (6, 8)}
LAYERS = 34


def _narrow_xception(monkeypatch, *arguments, **options) -> keras.Model:
    module = sys.modules[xception.__module__]
    for name, filters in FILTERS.items():
        monkeypatch.setattr(module, name, filters)
    return xception((32, 32, 1), 3, *arguments, dtype="float64", **options)


def assert_a_training_step_is_keras(order: str, monkeypatch, ran: list[str]) -> None:
    """Every weight is the one that Keras's own layers leave, and every step was a CUDA kernel's, of those that `ran`.

    In float64, where rounding cannot hide a difference that 34 layers and 40 normalisations would blow up.
    """
    stock = keras.layers.SeparableConv2D if order == "depthwise_pointwise" else pointwise_then_depthwise
    keras.utils.set_random_seed(1)
    ours = _narrow_xception(monkeypatch, order=order)
    theirs = _narrow_xception(monkeypatch, stock)
    assert sum(isinstance(layer, fastsepconv.FastSeparableConv2D) for layer in ours.layers) == LAYERS
    theirs.set_weights(ours.get_weights())
    before = ours.get_weights()
    rng = np.random.default_rng(0)
    images, labels = rng.random((2, 32, 32, 1)), np.array([0, 2])
    losses = []
    for model in (ours, theirs):
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        losses.append(model.train_on_batch(images, labels))
    np.testing.assert_allclose(*losses, rtol=1e-9)
    moved = 0
    for weight, our, their, old in zip(ours.weights, ours.get_weights(), theirs.get_weights(), before, strict=True):
        scale = max(1e-3, np.abs(their).max())  # a bias before a normalisation has a gradient of nothing but rounding
        assert np.abs(our - their).max() <= 1e-8 * scale, weight.path
        moved += not np.array_equal(our, old)
    assert moved > len(before) / 2
    for operation in ("depthwise", "pointwise"):
        for step, arrays in (("forward", 3), ("d_x", 3), ("d_kernel", 2)):
            kernel = f"{operation}_{step}[{','.join(['float64'] * arrays)}]"
            assert ran.count(kernel) >= LAYERS, kernel
