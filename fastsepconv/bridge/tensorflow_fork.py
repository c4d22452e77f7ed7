"""A process that was forked after TensorFlow had started its threads.

They do not survive a fork, so that most of what TensorFlow is then asked to do, by its own operations too, waits for
ever. Here that ends in an error. A graph traced before the fork would not even come to our code: so the child's
`tf.function`s, all of which would hang, run as plain Python, which does.
"""

from __future__ import annotations

import os

import tensorflow as tf
from tensorflow.python.eager import context

_forked = False


def refuse_in_child() -> None:
    """Raises RuntimeError in a process that was forked after TensorFlow had started its threads."""
    if _forked:
        raise RuntimeError(
            "This process was forked after TensorFlow had started its threads. They do not survive a fork: TensorFlow "
            "would wait for them for ever. Start workers with multiprocessing's 'spawn' or 'forkserver' method, or "
            "before TensorFlow first computes. The array functions, such as fastsepconv.separable_conv2d, do work here."
        )


def _after_fork_in_child() -> None:
    global _forked
    eager = context.context_safe()
    if eager is not None and eager._context_handle is not None:
        _forked = True
        tf.config.run_functions_eagerly(True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
