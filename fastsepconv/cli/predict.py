"""`fastsepconv predict`: what a trained model says about pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsepconv.cli.console import OK, USAGE, CommandError, Console, add_command, count, load_keras, require
from fastsepconv.cli.data import default_labels

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

DESCRIPTION = """Classify pictures, or every picture of a folder, with a saved model. A picture is turned grey (or
RGB, as the model takes it) and brought to the model's size; black to white becomes 0 to 1, as in training on
images of uint8. A model that was trained on standardised images wants those, which this command does not make."""

EXAMPLES = (
    "fastsepconv predict face.png --model run/model.keras",
    "fastsepconv predict faces/ --model run/best.keras --top 2",
    "fastsepconv predict scan.jpg --model fastsepconv-demo/fastsepconv/model.keras --invert",
    "fastsepconv predict faces/ --model run/model.keras --json",
)


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    command = add_command(subparsers, "predict", "classify pictures with a trained model", DESCRIPTION, EXAMPLES)
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture, or folder of pictures")
    command.add_argument("--model", type=Path, required=True, metavar="FILE", help=".keras file")
    command.add_argument(
        "--labels", metavar="A,B,..", help="names of the classes (default: those that the model carries)"
    )
    command.add_argument("--top", type=count(1), default=3, metavar="K", help="how many classes to name (default: 3)")
    command.add_argument(
        "--invert", action="store_true", help="dark becomes light: for ink on paper, if trained on light on dark"
    )
    command.add_argument("--batch-size", type=count(1), default=64, help="pictures at a time (default: 64)")


def run(args: argparse.Namespace) -> int:
    """Predict; returns the exit code."""
    console = Console(args.json)
    require(PIL="pillow")
    paths = _pictures(args.images)
    load_keras()
    import keras

    from fastsepconv.cli import checkpoint

    keras.utils.set_random_seed(args.seed)
    model = checkpoint.load(args.model)
    height, width, channels = _input_shape(model, args.model)
    x = np.stack([read_picture(path, height, width, channels, args.invert) for path in paths])
    probabilities = model.predict(x, batch_size=args.batch_size, verbose=0)
    labels = _labels(args, checkpoint.training(args.model), probabilities)
    _show(paths, probabilities, labels, args.top, console)
    console.document({"model": str(args.model), "images": _document(paths, probabilities, labels)})
    return OK


def _pictures(given: Sequence[Path]) -> list[Path]:
    """The files themselves, and of each folder the files that Pillow knows by their names, sorted."""
    from PIL import Image

    known = set(Image.registered_extensions())
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(child for child in path.iterdir() if child.suffix.lower() in known)
            if not inside:
                raise CommandError(f"{path}: Expected a folder with pictures (.png, .jpg, ..). Received: none in it")
            found += inside
        else:
            found.append(path)
    return found


def _input_shape(model: Any, path: Path) -> tuple[int, int, int]:
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    if len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][-1] in (1, 3) and None not in shapes[0]:
        return shapes[0]
    raise CommandError(f"{path}: Expected a model of one input (height, width, 1 or 3). Received: {shapes}")


def read_picture(path: Path, height: int, width: int, channels: int, invert: bool = False) -> np.ndarray:
    """A picture as float32 `[height, width, channels]` from 0 to 1; raises CommandError, which names the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = _eight_bits(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file. Expected a picture or a folder of pictures") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(
            f"{path}: not a readable picture ({error}). Expected PNG, JPEG or what else Pillow reads"
        ) from None
    pixels = pixels.reshape(height, width, channels) / np.float32(255)
    return 1 - pixels if invert else pixels


def _eight_bits(image: PillowImage) -> PillowImage:
    """The picture with 8 bits a channel. Pillow's own conversion cuts 16-bit greys off at 255."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("32-bit floats, whose range nobody knows")
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"greys from {grey.min()} to {grey.max()}, more than 16 bits")
    return Image.fromarray(np.round(grey / 257).astype(np.uint8))


def _labels(args: argparse.Namespace, training: dict[str, Any], probabilities: np.ndarray) -> tuple[str, ...]:
    if probabilities.ndim != 2:
        raise CommandError(f"{args.model}: Expected a model that gives (n, classes). Received: {probabilities.shape}")
    classes = probabilities.shape[1]
    labels = tuple(args.labels.split(",")) if args.labels else tuple(training.get("labels") or default_labels(classes))
    if len(labels) != classes:
        raise CommandError(
            f"Invalid value for argument `--labels`. Expected {classes} names. Received: {len(labels)}", USAGE
        )
    return labels


def _document(paths: Sequence[Path], probabilities: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "file": str(path),
            "label": labels[int(row.argmax())],
            "class": int(row.argmax()),
            "probability": float(row.max()),
            "probabilities": {label: float(value) for label, value in zip(labels, row, strict=True)},
        }
        for path, row in zip(paths, probabilities, strict=True)
    ]


def _show(paths: Sequence[Path], probabilities: np.ndarray, labels: Sequence[str], top: int, console: Console) -> None:
    rows = []
    for path, row in zip(paths, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        rows.append((path, *(f"{labels[index]} {row[index]:6.1%}" for index in best)))
    names = ("prediction", *("or",) * (min(top, len(labels)) - 1))
    console.table(("picture", *names), rows)
