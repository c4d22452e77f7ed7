"""A whole network as a frozen TensorFlow graph, its variables made constants: the stock model, or ours by `freeze`."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from .. import data, networks
from ..problems import Problem


class Provider:
    def __init__(self, threads: int, ours: bool):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        self.ours = ours
        self.versions = {"tensorflow": tf.__version__}
        if ours:
            import fastsepconv

            self.versions |= {"fastsepconv": fastsepconv.__version__}

    def prepare(self, problem: Problem, folder: Path):
        model = networks.build(problem.suite, ours=self.ours)
        networks.restore(model, folder)
        x = tf.constant(data.load_input(folder)["x"])
        if self.ours:
            import fastsepconv

            ours = fastsepconv.freeze(model)
            return [lambda: ours(x)], lambda y: {"y": y.numpy()}
        graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(x)
        stock = convert_variables_to_constants_v2(graph)
        return [lambda: stock(x)[0]], lambda y: {"y": y.numpy()}
