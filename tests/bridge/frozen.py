"""What the tests of frozen models share: a small model, and what is to be seen of a frozen graph."""

from __future__ import annotations

import keras
import pytest

from fastsepconv.bridge import tensorflow_freeze
from fastsepconv.layers import FastDepthwiseConv2D, FastSeparableConv2D


def marks(nodes, attribute: str) -> list[int]:
    return [node.attr[attribute].i for node in nodes if attribute in node.attr]


@pytest.fixture
def frozen_nodes(monkeypatch):
    """The nodes that `freeze` has marked."""
    found, mark = [], tensorflow_freeze._take_in_relus_of_x
    monkeypatch.setattr(tensorflow_freeze, "_take_in_relus_of_x", lambda nodes: (mark(nodes), found.extend(nodes)))
    return found


def needed(nodes) -> set[str]:
    """The operations that the results of a graph come from."""
    named, found = {node.name: node for node in nodes}, set()
    wanted = [node.name for node in nodes if node.name.startswith("Identity")]
    while wanted:
        node = named[wanted.pop()]
        found.add(node.op)
        wanted += [name.partition(":")[0].lstrip("^") for name in node.input]
    return found


def small(order="depthwise_pointwise", **arguments):
    layers = [
        FastSeparableConv2D(24, 3, padding="same", depth_multiplier=2, use_bias=False, order=order, **arguments),
        keras.layers.BatchNormalization(**arguments),
        keras.layers.ReLU(**arguments),
        FastDepthwiseConv2D(3, depth_multiplier=2, **arguments),
        keras.layers.BatchNormalization(center=False, scale=False, **arguments),
        FastSeparableConv2D(5, 3, strides=2, use_bias=False, order=order, **arguments),
    ]
    return keras.Sequential([keras.Input((9, 8, 6)), *layers])
