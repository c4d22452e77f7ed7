"""A copy of a Keras model that shares nothing with it but plain operations.

Saving and loading would do, but for what Keras 3 loses on that way: a layer shared by nested models or wrappers comes
back twice or not at all, and trainable flags may change.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import keras


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """Every layer of `model` at any depth, itself first, each once; TypeError where it is no `keras.Model`."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"Invalid value for argument `model`. Expected a keras.Model. Received: model={model!r}")
    return list({id(layer): layer for layer in model._flatten_layers(include_self=True, recursive=True)}.values())


def copy_model(model: keras.Model, *, otherwise: str = "") -> keras.Model:
    """`model` once more: layers, sharing, weights, trainable flags, seeds, compilation and the optimizer's state.

    `otherwise` is what a caller whose model cannot be copied may do instead, for the message.

    Raises:
        ValueError: a part of it cannot be made again from its configuration.
    """
    custom = _custom_objects(model)
    try:
        with keras.saving.custom_object_scope(custom):
            copy = _Copies()(model)
            _copy_state(model, copy)
            return copy
    except Exception as error:
        raise ValueError(
            "Invalid value for argument `model`. Expected a model that its configuration describes, so that it can be "
            "copied; register the objects that Keras does not know (keras.saving.register_keras_serializable)"
            f"{otherwise}. Received: model={model!r}, which gave {type(error).__name__}: {error}"
        ) from error


def _custom_objects(model: keras.Model) -> dict[str, Any]:
    """The functions and classes of the user's own that `model` holds, by the names they have in its configuration."""
    parts = [part for layer in layers_of(model) for part in (layer, *vars(layer).values())]
    if model.compiled:
        parts += keras.tree.flatten(model._compile_config.config)
    objects = [part if isinstance(part, FunctionType) else type(part) for part in parts]
    return {
        keras.saving.get_registered_name(custom): custom
        for custom in objects
        if (isinstance(custom, FunctionType) or hasattr(custom, "from_config"))
        and not custom.__module__.startswith("keras.")
    }


class _Copies:
    """Called with a part of a model, gives its copy, the same one each time."""

    def __init__(self) -> None:
        self.copies: dict[int, Any] = {}

    def __call__(self, part: Any) -> Any:
        if id(part) not in self.copies:
            self.copies[id(part)] = self._copy(part)
        return self.copies[id(part)]

    def _copy(self, part: Any) -> Any:
        if not isinstance(part, keras.Layer):
            return part  # an operation, which has no state
        if isinstance(part, keras.Sequential | keras.Function):
            copy = keras.models.clone_model(part, self._inputs(part), self)
            if type(copy) is type(part):
                return copy
        config = part.get_config()
        if isinstance(part, keras.layers.Wrapper):
            return type(part)(**config | {"layer": self(part.layer)})
        if type(part) is keras.layers.Lambda:
            copy = keras.layers.Lambda.from_config(config, safe_mode=False)
            copy.function = part.function  # from the configuration it comes without its globals
            return copy
        copy = type(part).from_config(config)
        if isinstance(part, keras.Model) and part.built and not copy.built:
            copy.build_from_config(part.get_build_config())
        return copy

    def _inputs(self, model: keras.Model) -> Any:
        """Copies of a Functional model's inputs, whose names `clone_model` would not keep."""
        if isinstance(model, keras.Sequential):
            return None
        return keras.tree.map_structure(lambda tensor: self(tensor._keras_history.operation).output, model.input)


def _copy_state(model: keras.Model, copy: keras.Model) -> None:
    layers = list(zip(layers_of(model), layers_of(copy), strict=True))
    # A flag spreads to all that a layer contains, so those that contain most are set first.
    for layer, twin in sorted(layers, key=lambda pair: -len(pair[0]._flatten_layers())):
        twin.trainable = layer.trainable
    for variable, twin in zip(model.variables, copy.variables, strict=True):
        twin.trainable = variable.trainable
    _assign(copy.variables, model.variables)
    if model.compiled:
        copy.compile_from_config(model.get_compile_config())
        if copy.compiled and model.optimizer.built:
            _assign(copy.optimizer.variables, model.optimizer.variables)


def _assign(targets: list[keras.Variable], sources: list[keras.Variable]) -> None:
    """Copy values by way of NumPy: between its own arrays JAX would share the memory, which training gives away."""
    for target, source in zip(targets, sources, strict=True):
        target.assign(source.numpy())
