"""The tutorial's count: what the separable convolutions cost, and what standard ones in their place would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import keras

from fastsepconv.cli.console import Console


class LayerCost(NamedTuple):
    """Multiplications of one layer for one image, P x Q output pixels, R x S taps, C channels, F filters."""

    name: str
    output: tuple[int, int]
    taps: tuple[int, int]
    channels: int
    filters: int
    standard: int
    separable: int


def count(model: keras.Model) -> list[LayerCost]:
    """The cost of each separable convolution of `model`, in its order.

    The tutorial's K^2 d^2 C N for a standard convolution, with P Q for its K^2 and R S for its d^2, and for a
    separable one the sum of its two steps, P Q C (R S M) and P Q (C M) N. Biases are left out, as there.
    """
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.SeparableConv2D)]
    return [_cost(layer) for layer in layers]


def _cost(layer: keras.layers.SeparableConv2D) -> LayerCost:
    channel_axis = -1 if layer.data_format == "channels_last" else 1
    shapes = [list(tensor.shape[1:]) for tensor in (layer.input, layer.output)]
    channels, outputs = (shape.pop(channel_axis if channel_axis < 0 else 0) for shape in shapes)
    before, after = map(math.prod, shapes)
    taps, multiplier = math.prod(layer.kernel_size), layer.depth_multiplier
    if getattr(layer, "order", "depthwise_pointwise") == "depthwise_pointwise":
        separable = after * channels * multiplier * (taps + layer.filters)
    else:
        separable = before * channels * layer.filters + after * layer.filters * multiplier * taps
    standard = after * taps * channels * outputs
    return LayerCost(layer.name, tuple(shapes[1]), layer.kernel_size, channels, outputs, standard, separable)


def totals(costs: Sequence[LayerCost]) -> tuple[int, int]:
    """(standard, separable) of all layers together."""
    return sum(cost.standard for cost in costs), sum(cost.separable for cost in costs)


def show(costs: Sequence[LayerCost], console: Console) -> None:
    """Print the table; layers of one shape that follow each other share a line."""
    rows = []
    for _, group in groupby(costs, key=lambda cost: cost[1:]):
        same = list(group)
        first = same[0]
        rows.append(
            (
                first.name if len(same) == 1 else f"{first.name} ..",
                len(same),
                "x".join(map(str, first.output)),
                f"{first.channels} -> {first.filters}",
                *_millions(len(same) * first.standard, len(same) * first.separable),
            )
        )
    footer = ("all, multiplications", len(costs), "", "", *_millions(*totals(costs)))
    console.table(("layer", "n", "output", "channels", "standard", "separable", "ratio"), rows, footer)


def _millions(standard: int, separable: int) -> tuple[str, str, str]:
    return f"{standard / 1e6:,.1f} M", f"{separable / 1e6:,.1f} M", f"{standard / separable:.2f}x"
