"""A whole network as TensorFlow's frozen graph: the stock model with its variables made constants."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from .. import data, networks
from ..problems import Problem


class Provider:
    def __init__(self, threads: int):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        self.versions = {"tensorflow": tf.__version__}

    def prepare(self, problem: Problem, folder: Path):
        model = networks.build(problem.suite, ours=False)
        networks.restore(model, folder)
        x = tf.constant(data.load_input(folder)["x"])
        graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(x)
        frozen = convert_variables_to_constants_v2(graph)
        return [lambda: frozen(x)[0]], lambda y: {"y": y.numpy()}
