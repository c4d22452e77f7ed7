"""The pictures of a run, drawn so that they can be printed: learning curve, confusion matrix, network, demo sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastsepconv.cli.console import stderr_kept_back

History = Mapping[str, Sequence[float]]

BLUE, ORANGE, RED, GREY = "#0072b2", "#d55e00", "#b2182b", "#6b6b6b"  # told apart by colour-blind readers too
DPI = 200
HEADING: dict[str, Any] = {"x": 0.01, "ha": "left", "weight": "bold", "size": 10}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "xtick.color": "#404040",
    "ytick.color": "#404040",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def learning_curve(history: History, path: Path) -> None:
    """Loss and accuracy of every epoch, on training and validation images."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        axes = figure.subplots(1, 2)
        for each, quantity in zip(axes, ("loss", "accuracy"), strict=True):
            _curves(each, {"training": history[quantity], "validation": history[f"val_{quantity}"]}, quantity)
        axes[0].set_ylim(bottom=0)
        axes[0].legend()
        figure.savefig(path, dpi=DPI)


def _curves(axes: Axes, curves: Mapping[str, Sequence[float]], quantity: str) -> None:
    """Draw curves over epochs 1 .. n; accuracy in per cent up to 100."""
    for (label, values), (colour, dashes) in zip(curves.items(), ((BLUE, "-"), (ORANGE, "--")), strict=True):
        marker = "o" if len(values) <= 30 else ""
        axes.plot(range(1, len(values) + 1), values, dashes, color=colour, label=label, marker=marker, markersize=3.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(quantity)
    epochs = max(map(len, curves.values()))
    if epochs == 1:  # Matplotlib would spread ticks over a twentieth of an epoch to either side
        axes.set_xticks([1])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if quantity == "accuracy":
        low = min(min(values) for values in curves.values())
        axes.set_ylim(max(0.0, low - 0.05 * (1.05 - low)), 1 + 0.03 * (1.05 - low))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def confusion_matrix(matrix: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Counts `[true, predicted]`, shaded by the share of the true class."""
    classes = len(labels)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 1.9 + 0.46 * classes
    with rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for true, predicted in np.ndindex(matrix.shape):
            if matrix[true, predicted]:
                colour = "white" if shares[true, predicted] > 0.55 else "#202020"
                axes.text(
                    predicted, true, f"{matrix[true, predicted]:,}", ha="center", va="center", color=colour, size=8
                )
        slanted: dict[str, Any] = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 2 else {}
        )
        axes.set_xticks(range(classes), labels, **slanted)
        axes.set_yticks(range(classes), labels)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        correct = np.trace(matrix) / max(matrix.sum(), 1)
        axes.set_title(f"{matrix.sum():,} held-out images, {correct:.2%} correct")
        bar = figure.colorbar(image, shrink=0.75, format=PercentFormatter(1, decimals=0))
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        figure.savefig(path, dpi=DPI)


def network(model: Any, path: Path) -> str | None:
    """Draw Keras's plot_model. Returns why that cannot be, or None.

    plot_model itself runs Graphviz's program `dot`, which pip does not bring; pygraphviz holds the same as a library.
    """
    missing = [name for name in ("pydot", "pygraphviz") if find_spec(name) is None]
    if missing:
        return f"no picture of the network. Expected: pip install {' '.join(missing)}"
    from keras.utils import model_to_dot
    from pygraphviz import AGraph

    dot = model_to_dot(model, show_shapes=True, show_layer_names=True, dpi=72)
    for layer in model.layers:  # ours go by the names of Keras's, for the sake of weight files
        for node in dot.get_node(str(id(layer))):
            node.set_label(node.get_label().replace(f"({type(layer).__name__})", f"({type(layer).__qualname__})"))
    with stderr_kept_back():  # where it is told that some file of the system's fonts is newer than the library
        AGraph(dot.to_string()).draw(str(path), prog="dot")
    return None


def demo_sheet(
    ours: History, stock: History, x: np.ndarray, y: np.ndarray, probabilities: np.ndarray, path: Path
) -> None:
    """Held-out loss and accuracy of both networks; held-out images `[n,H,W,1]`, the mistaken ones first."""
    rows, columns = 3, 10
    predicted = probabilities.argmax(axis=1)
    mistaken = np.flatnonzero(predicted != y)
    shown = np.concatenate([mistaken, np.flatnonzero(predicted == y)])[: rows * columns]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(2.5, 2.9)))
        axes = top.subplots(1, 2)
        for each, quantity in zip(axes, ("loss", "accuracy"), strict=True):
            _curves(each, {"fastsepconv": ours[f"val_{quantity}"], "Keras": stock[f"val_{quantity}"]}, quantity)
        if len(ours["val_loss"]) > 1:  # of one epoch nearly equal losses would fill the axis with digits
            axes[0].set_yscale("log")
        axes[0].legend()
        top.suptitle("Held-out images after each epoch", **HEADING)
        bottom.suptitle(f"Predictions by fastsepconv: {len(mistaken)} of {len(y)} held-out images mistaken", **HEADING)
        for each, index in zip(bottom.subplots(rows, columns).flat, shown, strict=False):
            _prediction(each, x[index], int(y[index]), probabilities[index])
        for each in bottom.get_axes()[len(shown) :]:
            each.set_axis_off()
        figure.savefig(path, dpi=DPI)


def _prediction(axes: Axes, image: np.ndarray, true: int, probabilities: np.ndarray) -> None:
    predicted = int(probabilities.argmax())
    right = predicted == true
    axes.imshow(image[..., 0], cmap="gray_r")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#d0d0d0" if right else RED)
    text = f"{predicted}  {probabilities[predicted]:.0%}" if right else f"{predicted}, not {true}"
    axes.set_title(text, size=7.5, loc="center", pad=2.5, weight="normal", color="#202020" if right else RED)
