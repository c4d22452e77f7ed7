"""Xception as the tutorial builds it: an entry, a middle and an exit flow of 34 separable convolutions.

Differences from its text, which would not run today or does not mean what it says: the classifier ends in a softmax
over `classes` rather than in `Dense(1)`, and every layer has a name of its own, the same for each `separable_layer`,
so that networks on different layers exchange weights by position, by name and by file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from .. import checks
from ..layers import FastSeparableConv2D

ENTRY_FILTERS = (128, 256, 728)
MIDDLE_FILTERS = 728
EXIT_FILTERS = (728, 1024)

SeparableLayer = Callable[..., keras.Layer]


def xception(
    input_shape: tuple[int | None, ...] = (48, 48, 1),
    classes: int = 7,
    separable_layer: SeparableLayer = FastSeparableConv2D,
    *,
    num_blocks: int = 8,
    include_top: bool = True,
    order: str = "depthwise_pointwise",
    batch_norm_momentum: float = 0.99,
    dtype: Any = None,
    name: str = "xception",
) -> keras.Model:
    """The tutorial's Xception, not compiled.

    Args:
        input_shape: `(height, width, channels)`; height and width may be None.
        classes: number of classes.
        separable_layer: the separable convolution, a class or a function, called as
            `separable_layer(filters, 3, padding="same", name=..., dtype=...)`. With `keras.layers.SeparableConv2D`
            this is the stock twin of the default, with the same weight names, shapes and order.
        num_blocks: blocks of the middle flow, three separable convolutions each.
        include_top: end in the class probabilities `[N, classes]`; else in the features `[N, P, Q, 1024]`.
        order: passed to `separable_layer` where it is not the default, as stock layers do not know it.
        batch_norm_momentum: how slowly batch normalisation's moving averages move; 0.99 wants thousands of steps.
        dtype: dtype or policy of every layer; the classifier takes the dtype of its variables, float32 if it is mixed.
        name: name of the model.

    Raises:
        TypeError: `separable_layer` cannot be called.
        ValueError: a size is not what it has to be, or `order` is none.
    """
    _check(input_shape, classes, separable_layer, num_blocks, order)
    options = {"order": order, "batch_norm_momentum": batch_norm_momentum, "dtype": dtype}
    inputs = keras.Input(input_shape, name="images")
    x = entry_flow(inputs, separable_layer, **options)
    x = middle_flow(x, separable_layer, num_blocks=num_blocks, **options)
    x = exit_flow(x, separable_layer, **options)
    if include_top:
        top_dtype = keras.dtype_policies.get(dtype).variable_dtype
        x = keras.layers.GlobalAveragePooling2D(name="average_pool", dtype=top_dtype)(x)
        x = keras.layers.Dense(classes, activation="softmax", name="predictions", dtype=top_dtype)(x)
    return keras.Model(inputs, x, name=name)


def _check(input_shape: Any, classes: Any, separable_layer: Any, num_blocks: Any, order: Any) -> None:
    sizes = input_shape if isinstance(input_shape, tuple | list) else ()
    channels = len(sizes) == 3 and checks.integer(sizes[2], 1) is not None
    if not channels or not all(size is None or checks.integer(size, 1) is not None for size in sizes):
        raise checks.invalid("input_shape", "(height, width, channels), positive integers", input_shape)
    for argument, value, least in (("classes", classes, 1), ("num_blocks", num_blocks, 0)):
        if checks.integer(value, least) is None:
            raise checks.invalid(argument, f"an integer of at least {least}", value)
    if not callable(separable_layer):
        raise checks.invalid("separable_layer", "a layer's class or a function", separable_layer, kind=TypeError)
    checks.order(order)


def entry_flow(x, separable_layer: SeparableLayer = FastSeparableConv2D, **options):
    """Two convolutions, then three blocks of two separable ones: `[N, H, W, C]` to `[N, H/16, W/16, 728]`."""
    make = _Layers(separable_layer, **options)
    x = make.conv(32, 3, strides=2, name="entry_conv1")(x)
    x = make.relu("entry_conv1_relu")(make.norm("entry_conv1_norm")(x))
    x = make.conv(64, 3, name="entry_conv2")(x)
    x = make.relu("entry_conv2_relu")(make.norm("entry_conv2_norm")(x))
    for block, filters in enumerate(ENTRY_FILTERS, start=1):
        x = _shrinking_block(make, x, (filters, filters), f"entry_block{block}")
    return x


def middle_flow(x, separable_layer: SeparableLayer = FastSeparableConv2D, *, num_blocks: int = 8, **options):
    """`num_blocks` blocks of three separable convolutions with a shortcut; the shape `[N, P, Q, 728]` stays."""
    make = _Layers(separable_layer, **options)
    for block in range(1, num_blocks + 1):
        shortcut = x
        for step in (1, 2, 3):
            x = make.unit(x, MIDDLE_FILTERS, f"middle_block{block}_separable{step}")
        x = make.add(f"middle_block{block}_add")([x, shortcut])
    return x


def exit_flow(x, separable_layer: SeparableLayer = FastSeparableConv2D, **options):
    """A block of two separable convolutions, then two more: `[N, P, Q, 728]` to `[N, P/2, Q/2, 1024]`."""
    make = _Layers(separable_layer, **options)
    x = _shrinking_block(make, x, EXIT_FILTERS, "exit_block")
    for step, filters in enumerate(EXIT_FILTERS, start=3):
        x = make.unit(x, filters, f"exit_separable{step}")
    return x


def _shrinking_block(make: _Layers, x, filters: tuple[int, int], name: str):
    """Two separable units and a pooling that halves the image, beside a convolution that does the same."""
    shortcut = make.conv(filters[-1], 1, strides=2, name=f"{name}_shortcut")(x)
    for step, size in enumerate(filters, start=1):
        x = make.unit(x, size, f"{name}_separable{step}")
    x = make.pool(f"{name}_pool")(x)
    return make.add(f"{name}_add")([x, shortcut])


class _Layers:
    """The network's layers, each made with the options that all of them share."""

    def __init__(
        self,
        separable_layer: SeparableLayer,
        *,
        order: str = "depthwise_pointwise",
        batch_norm_momentum: float = 0.99,
        dtype: Any = None,
    ):
        self.separable_layer = separable_layer
        self.order = {} if order == "depthwise_pointwise" else {"order": order}
        self.momentum = batch_norm_momentum
        self.dtype = dtype

    def unit(self, x, filters: int, name: str):
        """ReLU, separable convolution, batch normalisation."""
        x = self.relu(f"{name}_relu")(x)
        x = self.separable_layer(filters, 3, padding="same", name=name, dtype=self.dtype, **self.order)(x)
        return self.norm(f"{name}_norm")(x)

    def conv(self, filters: int, kernel_size: int, *, strides: int = 1, name: str):
        return keras.layers.Conv2D(filters, kernel_size, strides=strides, padding="same", name=name, dtype=self.dtype)

    def norm(self, name: str):
        return keras.layers.BatchNormalization(momentum=self.momentum, name=name, dtype=self.dtype)

    def relu(self, name: str):
        return keras.layers.Activation("relu", name=name, dtype=self.dtype)

    def pool(self, name: str):
        return keras.layers.MaxPooling2D(3, strides=2, padding="same", name=name, dtype=self.dtype)

    def add(self, name: str):
        return keras.layers.Add(name=name, dtype=self.dtype)


def pointwise_then_depthwise(filters: int, kernel_size: Any, *, name: str | None = None, dtype: Any = None, **options):
    """Two stock layers that compute what `FastSeparableConv2D(..., order="pointwise_depthwise")` computes.

    `Conv2D(filters, 1)` without bias, then `DepthwiseConv2D(kernel_size, **options)`, as one Sequential. Its weights
    have that layer's shapes and order, so `set_weights` takes them from one to the other; as `separable_layer` it
    makes the stock twin of `xception(order="pointwise_depthwise")`.
    """
    data_format = options.get("data_format")
    return keras.Sequential(
        [
            keras.layers.Conv2D(filters, 1, use_bias=False, data_format=data_format, name="pointwise", dtype=dtype),
            keras.layers.DepthwiseConv2D(kernel_size, name="depthwise", dtype=dtype, **options),
        ],
        name=name,
    )
