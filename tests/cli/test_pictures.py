"""The pictures: that they are drawn, of what they are told, and what is said where they cannot be."""

from __future__ import annotations

from importlib.util import find_spec

import keras
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastsepconv.cli import pictures
from fastsepconv.cli.data import FER2013_LABELS
from fastsepconv.layers import FastSeparableConv2D

HISTORY = {
    "loss": [2.0, 1.0, 0.5],
    "accuracy": [0.2, 0.5, 0.8],
    "val_loss": [2.5, 1.5, 0.9],
    "val_accuracy": [0.1, 0.4, 0.7],
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def assert_drawn(path):
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(pixels.shape) > 400 and pixels.std() > 5


def test_the_learning_curve_shows_the_history(tmp_path, figures):
    pictures.learning_curve(HISTORY, tmp_path / "curve.png")
    assert_drawn(tmp_path / "curve.png")
    loss, accuracy = figures[0].get_axes()
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [HISTORY["loss"], HISTORY["val_loss"]]
    assert [list(line.get_ydata()) for line in accuracy.get_lines()] == [HISTORY["accuracy"], HISTORY["val_accuracy"]]
    assert list(loss.get_lines()[0].get_xdata()) == [1, 2, 3]


def test_the_confusion_matrix_has_fer2013s_order_and_the_counts(tmp_path, figures):
    matrix = np.arange(49).reshape(7, 7)
    pictures.confusion_matrix(matrix, FER2013_LABELS, tmp_path / "matrix.png")
    assert_drawn(tmp_path / "matrix.png")
    axes = figures[0].get_axes()[0]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == [
            "Angry",
            "Disgust",
            "Fear",
            "Happy",
            "Sad",
            "Surprise",
            "Neutral",
        ]
    texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert texts[(2, 1)] == "9"  # predicted 2, true 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_a_class_without_images_is_no_division_by_zero(tmp_path):
    pictures.confusion_matrix(np.diag([3, 0]), ("a", "b"), tmp_path / "matrix.png")
    assert_drawn(tmp_path / "matrix.png")


def test_the_demo_sheet_shows_mistakes_first(tmp_path, figures):
    x, y = np.zeros((5, 8, 8, 1), np.uint8), np.arange(5)
    probabilities = np.eye(5)
    probabilities[3] = [0, 1, 0, 0, 0]
    pictures.demo_sheet(HISTORY, HISTORY, x, y, probabilities, tmp_path / "demo.png")
    assert_drawn(tmp_path / "demo.png")
    titles = [axes.get_title() for axes in figures[0].get_axes() if axes.get_title()]
    assert titles == ["1, not 3", "0  100%", "1  100%", "2  100%", "4  100%"]


@pytest.mark.skipif(find_spec("pygraphviz") is None, reason="pygraphviz is not installed")
def test_the_network_is_drawn_without_any_program(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    heights = []
    for layers in (1, 4):
        model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(2) for _ in range(layers))])
        assert pictures.network(model, tmp_path / "model.png") is None
        image = Image.open(tmp_path / "model.png")
        heights.append(image.height)
        assert image.width > 200 and np.asarray(image.convert("L")).std() > 5
    assert heights[1] > 2 * heights[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(find_spec("pygraphviz") is None, reason="pygraphviz is not installed")
def test_the_network_names_our_layers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pygraphviz.AGraph.draw", lambda graph, *_, **__: drawn.append(graph.to_string()))
    sides = [FastSeparableConv2D(2, 3, name="ours"), keras.layers.SeparableConv2D(2, 3, name="theirs")]
    assert pictures.network(keras.Sequential([keras.Input((9, 9, 1)), *sides]), tmp_path / "model.png") is None
    assert "<b>ours</b> (FastSeparableConv2D)" in drawn[0]
    assert "<b>theirs</b> (SeparableConv2D)" in drawn[0]


def test_a_single_epoch_is_told_as_one(tmp_path, figures):
    history = {name: values[:1] for name, values in HISTORY.items()}
    pictures.learning_curve(history, tmp_path / "curve.png")
    x, y = np.zeros((5, 8, 8, 1), np.uint8), np.arange(5)
    pictures.demo_sheet(history, history, x, y, np.eye(5), tmp_path / "demo.png")
    for figure in figures:
        for axes in figure.get_axes()[:2]:
            assert list(axes.get_xticks()) == [1] and axes.get_yscale() == "linear"


def test_what_the_picture_of_the_network_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert "pip install pydot pygraphviz" in pictures.network(model, tmp_path / "model.png")
    assert not (tmp_path / "model.png").exists()
