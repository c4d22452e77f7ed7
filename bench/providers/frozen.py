"""A whole network as a frozen TensorFlow graph, its variables made constants: the stock model, or ours by `freeze`."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from .. import data, networks
from ..problems import Problem
from . import tensorflow


class Provider(tensorflow.Provider):
    def prepare(self, problem: Problem, folder: Path):
        model = networks.build(problem.suite, ours=self.ours)
        networks.restore(model, folder)
        x = tf.constant(data.load_input(folder)["x"])
        frozen = _ours(model) if self.ours else _stock(model, x)
        return [lambda: frozen(x)], lambda y: {"y": y.numpy()}


def _ours(model):
    import fastsepconv

    return fastsepconv.freeze(model)


def _stock(model, x):
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(x)
    frozen = convert_variables_to_constants_v2(graph)
    return lambda x: frozen(x)[0]
