"""convert and revert: a whole Keras model on this package's layers, and back on Keras's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import keras

from .copying import copy_model, layers_of
from .layers import FastDepthwiseConv2D, FastSeparableConv2D

Classes = Mapping[type[keras.Layer], type[keras.Layer]]

TO_FAST: Classes = {
    keras.layers.SeparableConv2D: FastSeparableConv2D,
    keras.layers.DepthwiseConv2D: FastDepthwiseConv2D,
}
TO_STOCK: Classes = {fast: stock for stock, fast in TO_FAST.items()}
OR_IN_PLACE = ", or pass in_place=True"


def convert(model: keras.Model, *, in_place: bool = False) -> keras.Model:
    """`model` with every stock `SeparableConv2D` and `DepthwiseConv2D` computed by this package's kernels.

    All of them are found: in nested models, in wrappers such as `TimeDistributed`, in layers of the user's own.
    Only layers of exactly these two classes change; a subclass may rely on what its parent does and stays as it is.
    Names, weights, sharing, trainable flags, dtype policies and the state of `compile()`, the optimizer's
    variables included, are kept.

    Args:
        model: any built `keras.Model`; it is left as it is unless `in_place`.
        in_place: change the layers of `model` itself (also where other models share them) instead of those of a
            copy. A model that its configuration does not describe, as a subclassed one without `get_config`, can only
            be converted in place.

    Returns:
        The copy, or `model` itself.

    Raises:
        TypeError: `model` is not a `keras.Model`.
        ValueError: `model` cannot be copied.
    """
    model = model if in_place else copy_model(model, otherwise=OR_IN_PLACE)
    if not any(type(layer) in (*TO_FAST, *TO_STOCK) for layer in layers_of(model)):
        warnings.warn(
            f"Model {model.name!r} holds neither a SeparableConv2D nor a DepthwiseConv2D: convert changed nothing.",
            stacklevel=2,
        )
    exchange(layers_of(model), TO_FAST)
    return _recompiled(model)


def revert(model: keras.Model, *, in_place: bool = False) -> keras.Model:
    """`model` with every `FastSeparableConv2D` and `FastDepthwiseConv2D` back as Keras's own layer.

    The reverse of `convert`, with the same arguments and errors; `revert(convert(model))` has the configuration
    and the weights of `model`.

    Raises:
        ValueError: also where a layer has `order="pointwise_depthwise"`, which no layer of Keras's has.
    """
    foreign = [layer.name for layer in layers_of(model) if getattr(layer, "order", "") == "pointwise_depthwise"]
    if foreign:
        raise ValueError(
            "Invalid value for argument `model`. Expected separable layers in the order of Keras's, depthwise first. "
            f'Received: order="pointwise_depthwise" in {", ".join(foreign)}'
        )
    model = model if in_place else copy_model(model, otherwise=OR_IN_PLACE)
    exchange(layers_of(model), TO_STOCK)
    return _recompiled(model)


def exchange(layers: list[keras.Layer], classes: Classes) -> list[keras.Layer]:
    """Give each of `layers` whose class is a key of `classes` the class it maps to; return those that it changed.

    Both hold the same state and differ in what they compute it with, so an instance may change its class where it
    stands: whoever refers to it (graphs, wrappers, lists, optimizers) needs no change.
    """
    changed = [layer for layer in layers if type(layer) in classes]
    for layer in changed:
        object.__setattr__(layer, "__class__", classes[type(layer)])
        layer.supports_jit = type(layer) in TO_FAST or keras.backend.backend() != "tensorflow"
    return changed


def _recompiled(model: keras.Model) -> keras.Model:
    """`model`, having forgotten the functions that were traced with the former layers."""
    for part in layers_of(model):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None
            if part.compiled and part.jit_compile and not all(layer.supports_jit for layer in layers_of(part)):
                part.jit_compile = False
    return model
