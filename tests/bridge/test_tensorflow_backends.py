"""Keras's layers run on the backend that was set: here the formulas; CUDA's in tests/kernels/cuda."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import fastsepconv
from fastsepconv import dispatch, formulas
from fastsepconv.bridge import tensorflow as bridge


@pytest.fixture
def used(monkeypatch):
    """The names of the formulas that ran."""
    names = []
    for name in ("separable_forward", "separable_backward", "depthwise_forward", "depthwise_backward"):
        function = getattr(formulas, name)

        def record(*arguments, name=name, function=function):
            names.append(name)
            function(*arguments)

        monkeypatch.setattr(formulas, name, record)
    monkeypatch.setattr(dispatch, "_chosen", None)
    return names


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: fastsepconv.FastSeparableConv2D(3, 3, padding="same"), "separable"),
        (lambda: fastsepconv.FastDepthwiseConv2D(3, padding="same"), "depthwise"),
    ],
    ids=["separable", "depthwise"],
)
def test_layers_and_their_gradients_run_on_the_backend_that_was_set(used, layer, kind):
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 5, 6, 4)), tf.float32)
    layer = layer()
    results = []
    for backend in ("cpu", "reference"):
        fastsepconv.set_backend(backend)
        assert bridge.status()["backend"] == backend
        with tf.GradientTape() as tape:
            y = layer(x)
            loss = tf.reduce_sum(y**2)
        results.append([y, *tape.gradient(loss, layer.trainable_variables)])
        assert used == ([] if backend == "cpu" else [f"{kind}_forward", f"{kind}_backward"])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
