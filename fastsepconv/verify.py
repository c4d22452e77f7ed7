"""verify: what this package's layers compute, beside what Keras's own compute from the same weights and inputs.

A ReLU or a maximum that a rounding error sends the other way changes a network's gradients by far more than the
rounding error, whoever computes them. So gradients are compared at the same activations: in the pass on our layers
each layer hands on what Keras's handed on, and the gradients alone run through our kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np

from . import bridge, checks
from .convert import TO_FAST, TO_STOCK, exchange
from .copying import layers_of

# In theory the gradient of a bias before batch normalisation is zero, and what is computed of it is rounding error.
# So the gradient of a vector, a sum over pixels, counts as at least this part of the sum of its terms' magnitudes.
NEGLIGIBLE = 1e-2

Call = Callable[..., Any]


@dataclass(frozen=True)
class LayerErrors:
    """One layer: the largest difference of its outputs, their largest magnitude, each variable's gradient error."""

    name: str
    kind: str
    output_error: float
    output_size: float
    gradient_errors: dict[str, float]


@dataclass(frozen=True)
class Report:
    """What `verify` found; `str(report)` is a table.

    Attributes:
        model: name of the model.
        max_output_error: the largest absolute difference of the model's outputs, each side running on its own.
        max_gradient_error: the largest error of a variable's gradient or of the input's, at the same activations:
            norm of the difference over norm of Keras's gradient.
        input_gradient_error: that of the input's alone; 0 for integer inputs.
        layers: one `LayerErrors` for each layer that has weights and was called, given the same inputs, in the order
            of the calls.
    """

    model: str
    max_output_error: float
    max_gradient_error: float
    input_gradient_error: float
    layers: tuple[LayerErrors, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{self.model}: this package's layers and Keras's own, same weights, same input",
            f"{'layer':{width}}  {'computed by':22}  output error  largest output  gradient error",
        ]
        for layer in self.layers:
            gradient = max(layer.gradient_errors.values(), default=0.0)
            lines.append(
                f"{layer.name:{width}}  {layer.kind:22}  {layer.output_error:12.1e}  {layer.output_size:14.1e}  "
                f"{gradient:14.1e}"
            )
        lines.append(f"largest difference of the model's outputs: {self.max_output_error:.1e}")
        lines.append(f"largest relative error of a gradient:      {self.max_gradient_error:.1e}")
        return "\n".join(lines)


@dataclass
class _Record:
    """What one layer did: its outputs on Keras's side, the sum of their gradients' magnitudes, our side's error."""

    outputs: list[Any] = field(default_factory=list)
    flow: float = 0.0
    error: float = 0.0


Records = dict[keras.Layer, _Record]


class _Gradients(NamedTuple):
    variables: list[np.ndarray]
    inputs: list[np.ndarray]


def verify(model: keras.Model, x: Any, y: Any = None, *, training: bool = False, seed: int = 0) -> Report:
    """Run `model` on `x` on this package's layers and on Keras's own, and compare all that comes out.

    Everything runs eagerly on the weights of `model` itself, which may be stock, converted or mixed, of any kind of
    Keras model, and is afterwards what it was before.

    Args:
        model: a built model.
        x: one batch of inputs, as `model(x)` takes them.
        y: targets; with them the gradients are those of the loss that `model` is compiled with, without them those
            of a sum of the outputs with random weights.
        training: compute as in training: batch statistics, dropout (with the same masks each time).
        seed: seed of the random weights.

    Raises:
        TypeError: `model` is not a `keras.Model`.
        ValueError: `model` has no layer to compare, `x` is no input of it or empty, or there are targets but no loss.
        RuntimeError: Keras runs on another backend than TensorFlow and PyTorch.
    """
    _autodiff()  # raises where there is none
    layers = layers_of(model)
    if not any(type(layer) in (*TO_FAST, *TO_STOCK) for layer in layers):
        raise ValueError(
            "Invalid value for argument `model`. Expected a model with a SeparableConv2D or DepthwiseConv2D, stock or "
            f"fast. Received: model={model!r}"
        )
    if y is not None and not model.compiled:
        raise ValueError(f"Invalid value for argument `y`. Expected None, as model={model!r} has not been compiled.")
    _check_input(model, x)

    changed = exchange(layers, TO_FAST)
    try:
        return _compare(model, layers, x, y, training, seed)
    finally:
        exchange(changed, TO_STOCK)


def _check_input(model: keras.Model, x: Any) -> None:
    """TensorFlow's own gradient of an empty batch is whatever the memory holds, so there is nothing to compare."""
    found = [tuple(getattr(each, "shape", None) or np.shape(each)) for each in keras.tree.flatten(x)]
    if any(0 in shape for shape in found):
        raise checks.invalid("x", "at least one image", found, ".shape")
    expected = [tuple(each.shape) for each in getattr(model, "inputs", None) or ()]
    fits = [
        len(shape) == len(wanted) and all(size in (None, given) for size, given in zip(wanted, shape, strict=True))
        for shape, wanted in zip(found, expected, strict=False)
    ]
    if expected and (len(found) != len(expected) or not all(fits)):
        raise checks.invalid("x", f"inputs of shape {expected}", found, ".shape")


def _autodiff() -> ModuleType:
    module = bridge.autodiff(keras.backend.backend())
    if module is None:
        raise RuntimeError(
            f"verify needs Keras on TensorFlow or PyTorch. Received: backend={keras.backend.backend()!r}"
        )
    return module


def _compare(model: keras.Model, layers: list[keras.Layer], x: Any, y: Any, training: bool, seed: int) -> Report:
    """The report on a model whose layers are ours by now."""
    watched = [layer for layer in layers if layer.weights and not layer._layers]
    stock_calls = {layer: layer.stock_call if type(layer) in TO_STOCK else layer.call for layer in watched}
    records: Records = defaultdict(_Record)
    with _unchanged_state(model):
        outputs = _arrays(model(x, training=training))
    with _calling({layer: _noting(records, layer, stock_calls[layer]) for layer in watched}):
        stock_outputs, stock = _run(model, x, y, training, seed)
    with _calling({layer: _keeping(records[layer], layer.call) for layer in list(records)}):
        _, ours = _run(model, x, y, training, seed)

    errors = _gradient_errors(model.trainable_variables, records, ours.variables, stock.variables)
    input_error = max(map(_relative_error, ours.inputs, stock.inputs), default=0.0)
    return Report(
        model=model.name,
        max_output_error=_worst(map(_largest_difference, outputs, stock_outputs)),
        max_gradient_error=_worst([*errors.values(), input_error]),
        input_gradient_error=input_error,
        layers=tuple(
            LayerErrors(
                name=layer.name,
                kind=type(layer).__qualname__,
                output_error=record.error,
                output_size=_worst(np.max(np.abs(output), initial=0.0) for output in _arrays(record.outputs)),
                gradient_errors={v.name: errors[id(v)] for v in layer.weights if id(v) in errors},
            )
            for layer, record in records.items()
        ),
    )


def _run(model: keras.Model, x: Any, y: Any, training: bool, seed: int) -> tuple[list[np.ndarray], _Gradients]:
    """The outputs, and the gradients of their loss."""

    def compute(x: Any) -> tuple[Any, Any]:
        outputs = model(x, training=training)
        loss = _weighted_sum(outputs, seed) if y is None else model.compute_loss(x, y, outputs, training=training)
        return outputs, loss

    variables = model.trainable_variables
    with _unchanged_state(model):
        outputs, parts = _autodiff().gradients(compute, x, variables)
    gradients = _arrays(parts)
    return _arrays(outputs), _Gradients(gradients[: len(variables)], gradients[len(variables) :])


def _noting(records: Records, layer: keras.Layer, call: Call) -> Call:
    """`call`, whose outputs and their gradients are noted (but for what is traced into a graph)."""

    def noting(output: Any) -> Any:
        records[layer].outputs.append(output)
        return _passing(output, output, records[layer])

    return _with_each_output(call, noting)


def _keeping(record: _Record, call: Call) -> Call:
    """`call`, handing on the outputs noted before in place of its own, from which they differ by `record.error`."""
    expected = iter(record.outputs)

    def keeping(output: Any) -> Any:
        noted = next(expected)
        record.error = _worst([record.error, *map(_largest_difference, _arrays(output), _arrays(noted))])
        return _passing(output, noted, _Record())

    return _with_each_output(call, keeping)


def _with_each_output(call: Call, function: Call) -> Call:
    def called(*args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        return keras.tree.map_structure(function, outputs) if _autodiff().eager() else outputs

    return called


def _passing(tensor: Any, value: Any, record: _Record) -> Any:
    """`value` in the forward pass; in the backward pass the gradient goes to `tensor`, noted in `record.flow`."""

    def note(gradient: Any) -> None:
        record.flow += float(np.sum(np.abs(_array(gradient)), dtype="float64"))

    return _autodiff().passing(tensor, value, note)


@contextmanager
def _calling(calls: Mapping[keras.Layer, Call]) -> Iterator[None]:
    """Have each layer compute with the function given for it."""
    for layer, call in calls.items():
        object.__setattr__(layer, "call", call)
    try:
        yield
    finally:
        for layer in calls:
            object.__delattr__(layer, "call")


@contextmanager
def _unchanged_state(model: keras.Model) -> Iterator[None]:
    """Put moving averages and random seeds back as they were."""
    state = [(variable, variable.numpy()) for variable in model.non_trainable_variables]
    try:
        yield
    finally:
        for variable, value in state:
            variable.assign(value)


def _weighted_sum(outputs: Any, seed: int) -> Any:
    """A number in which each element of `outputs` counts with a random weight."""
    random = np.random.default_rng(seed)
    return sum(
        keras.ops.sum(output * keras.ops.convert_to_tensor(random.standard_normal(output.shape), output.dtype))
        for output in keras.tree.flatten(outputs)
    )


def _gradient_errors(
    variables: list, records: Records, ours: list[np.ndarray], stock: list[np.ndarray]
) -> dict[int, float]:
    """Each variable's relative error, by the variable's id."""
    flow = {id(variable): record.flow for layer, record in records.items() for variable in layer.weights}
    errors = {}
    for variable, gradient, expected in zip(variables, ours, stock, strict=True):
        vector = flow.get(id(variable), 0.0) if gradient.ndim == 1 else 0.0
        errors[id(variable)] = _relative_error(gradient, expected, NEGLIGIBLE * vector / gradient.size**0.5)
    return errors


def _relative_error(ours: np.ndarray, stock: np.ndarray, least: float = 0.0) -> float:
    """Norm of the difference over norm of `stock`, which counts as at least `least`."""
    error = _norm(ours.astype("float64") - stock.astype("float64"))
    return error / max(_norm(stock), least) if error else 0.0


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype("float64").ravel()))


def _largest_difference(ours: np.ndarray, stock: np.ndarray) -> float:
    """The largest absolute difference; infinities and NaNs at the same places are equal."""
    ours, stock = ours.astype("float64"), stock.astype("float64")
    same = (ours == stock) | (np.isnan(ours) & np.isnan(stock))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(ours - stock)), initial=0.0))


def _worst(errors: Any) -> float:
    """The largest error, NaN if one is."""
    return float(np.max(list(errors), initial=0.0))


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def _arrays(tensors: Any) -> list[np.ndarray]:
    return [_array(tensor) for tensor in keras.tree.flatten(tensors)]
