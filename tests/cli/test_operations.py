"""The count of operations, against counts by hand and the tutorial's formulas."""

from __future__ import annotations

import keras
import pytest

from fastsepconv import FastSeparableConv2D
from fastsepconv.cli import operations
from fastsepconv.models import xception


def cost(layer, input_shape) -> operations.LayerCost:
    return operations.count(keras.Sequential([keras.Input(input_shape), layer]))[0]


def test_one_layer_by_the_tutorials_formulas():
    got = cost(keras.layers.SeparableConv2D(20, 3, padding="same", name="one"), (8, 8, 5))
    assert got.standard == 8**2 * 3**2 * 5 * 20
    assert got.separable == 8**2 * 3**2 * 5 + 8**2 * 5 * 20
    assert (got.name, got.output, got.taps, got.channels, got.filters) == ("one", (8, 8), (3, 3), 5, 20)


def test_strides_multiplier_and_kernel_shape_count():
    layer = FastSeparableConv2D(4, (3, 5), strides=2, depth_multiplier=2, padding="valid")
    got = cost(layer, (9, 11, 3))
    assert got.output == (4, 4)
    assert got.standard == 4 * 4 * 15 * 3 * 4
    assert got.separable == 4 * 4 * 15 * 3 * 2 + 4 * 4 * 6 * 4


def test_the_other_order_mixes_before_it_shrinks():
    layer = FastSeparableConv2D(4, 3, strides=2, padding="same", order="pointwise_depthwise")
    assert cost(layer, (8, 8, 5)).separable == 8 * 8 * 5 * 4 + 4 * 4 * 4 * 9


@pytest.mark.parametrize("layer", [FastSeparableConv2D, keras.layers.SeparableConv2D])
def test_the_tutorials_network(layer):
    costs = operations.count(xception(separable_layer=layer))
    assert len(costs) == 34
    assert sum(c.output == (3, 3) for c in costs) == 26
    standard, separable = operations.totals(costs)
    assert standard == sum(c.output[0] ** 2 * 9 * c.channels * c.filters for c in costs)
    assert separable == sum(c.output[0] ** 2 * c.channels * (9 + c.filters) for c in costs)
    # the tutorial: fewer by a factor of 1/N + 1/d^2, N being the filters
    assert 1 / 1024 + 1 / 9 < separable / standard < 1 / 128 + 1 / 9
