"""Gradients of Keras models on TensorFlow, for `verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


def gradients(function: Callable[[Any], tuple[Any, Any]], x: Any, variables: Sequence[Any]) -> tuple[Any, list[Any]]:
    """`function(x)` is (outputs, loss): the outputs, and the loss's gradients of the variables, then of x.

    x may be nested; its integer tensors have no gradient. What the loss does not depend on has one of zeros.
    """
    x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
    inputs = [tensor for tensor in keras.tree.flatten(x) if tensor.dtype.is_floating]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs, loss = function(x)
    zero = tf.UnconnectedGradients.ZERO
    return outputs, tape.gradient(loss, [*variables, *inputs], unconnected_gradients=zero)


def eager() -> bool:
    """Whether tensors have values now, and are not traced into a graph."""
    return tf.executing_eagerly()


def passing(tensor: Any, value: Any, note: Callable[[Any], None]) -> Any:
    """`value` in the forward pass; in the backward pass the gradient goes to `tensor`, and to `note`."""

    @tf.custom_gradient
    def pass_on(_: Any) -> Any:
        def backward(gradient: Any) -> Any:
            note(gradient)
            return gradient

        return tf.identity(value), backward

    return pass_on(tensor)
