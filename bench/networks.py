"""The whole networks, as Keras models: built, given the same weights, and stepped."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from . import data
from .problems import PREDICT, Network

LEARNING_RATE = 1e-4


def build(suite: str, ours: bool) -> keras.Model:
    """The "tutorial" network (models.xception) or "xception" (keras.applications.Xception), in stock layers or ours.

    Xception ends in logits: its random initial weights give a softmax so flat that it would hide an error.
    """
    if suite == "tutorial":
        from fastsepconv.models import xception

        return xception() if ours else xception(separable_layer=keras.layers.SeparableConv2D)
    model = keras.applications.Xception(weights=None, classifier_activation=None)
    if not ours:
        return model
    import fastsepconv

    return fastsepconv.convert(model)


def restore(model: keras.Model, folder: Path) -> None:
    """Give the model the weights that the reference left in `folder`."""
    model.set_weights(list(data.load(folder / "weights").values()))


def predict_step(model: keras.Model, folder: Path):
    """steps and read, as `providers` describes them, for a forward pass in inference mode."""
    x = tf.constant(data.load_input(folder)["x"], model.compute_dtype)

    @tf.function(autograph=False)
    def predict(x):
        return model(x, training=False)

    return [lambda: predict(x)], lambda y: {"y": y.numpy()}


def train_step(model: keras.Model, folder: Path):
    """steps and read for a whole step; it returns the loss, the predictions and every gradient."""
    arrays = data.load_input(folder)
    x, labels = tf.constant(arrays["x"], model.compute_dtype), tf.constant(arrays["labels"])
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=not _ends_in_softmax(model))

    @tf.function(autograph=False)
    def train(x, labels):
        with tf.GradientTape() as tape:
            y = model(x, training=True)
            loss = loss_of(labels, y)
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        return loss, y, *gradients

    def read(outputs):
        loss, y, *gradients = (value.numpy() for value in outputs)
        return {"loss": loss, "y": y} | {f"d_{index:04d}": value for index, value in enumerate(gradients)}

    return [lambda: train(x, labels)], read


def reference_step(problem: Network, folder: Path):
    """The stock model in float64; leaves the weights, the ONNX model and the count of operations in `folder`."""
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(int(data.load_input(folder)["seed"]))
    model = build(problem.suite, ours=False)
    data.save(folder / "weights", _rounded_weights(model))
    restore(model, folder)
    (folder / "flops").write_text(str(flops(model, problem)))
    if problem.mode != PREDICT:
        return train_step(model, folder)
    _write_onnx(model, folder)
    return predict_step(model, folder)


def flops(model: keras.Model, problem: Network) -> int:
    """Multiplications and additions of the convolutions and dense layers; training costs three forward passes."""
    total = 0
    for layer in model.layers:
        pixels = int(np.prod(layer.output.shape[1:-1]))
        kernels = [weight for weight in layer.weights if "kernel" in weight.name]
        total += 2 * problem.batch * pixels * sum(int(np.prod(kernel.shape)) for kernel in kernels)
    return total * (1 if problem.mode == PREDICT else 3)


def _rounded_weights(model: keras.Model) -> dict[str, np.ndarray]:
    return {f"{index:04d}": weight.astype(np.float32) for index, weight in enumerate(model.get_weights())}


def _ends_in_softmax(model: keras.Model) -> bool:
    return getattr(model.layers[-1], "activation", None) is keras.activations.softmax


def _write_onnx(model: keras.Model, folder: Path) -> None:
    try:
        from . import onnx_models
    except ImportError:
        return
    onnx_models.save(onnx_models.network_model(model), folder, 0)
