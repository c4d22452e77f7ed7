"""Where images come from: the tutorial's four .npy files, FER-2013's CSV, scikit-learn's digits."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsepconv.cli.console import CommandError, require

FER2013_LABELS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")
FER2013_SIDE = 48
FER2013_PARTS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
MOST_CLASSES = 4096  # more are a mistake, which would not fit the confusion matrix either
FLOATS = "from 0 to 1, from 0 to 255 (which become 0 to 1), or standardised (some below 0)"
FOLDER_EXPECTS = "X_train.npy, X_test.npy (images) and y_train.npy, y_test.npy (labels)"
CSV_EXPECTS = (
    "FER-2013's columns emotion (0 to 6), pixels (48x48 numbers from 0 to 255), Usage (Training, PublicTest, ..)"
)


class Images(NamedTuple):
    """Images uint8 or float32 `[N,H,W,C]`, labels int64 `[N]`."""

    x: np.ndarray
    y: np.ndarray


class Source(NamedTuple):
    """How to load images again: from a folder of .npy files or a CSV, with what is held out to validate on."""

    kind: str  # "folder" or "csv"
    path: str
    labels: tuple[str, ...] | None = None
    validation: float = 0.0
    seed: int = 0


class Dataset(NamedTuple):
    """What a run learns from, what it is watched on after each epoch, what it is judged on at the end."""

    train: Images
    validation: Images
    test: Images
    labels: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of every image and label, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for array in part:
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()


def load(source: Source) -> Dataset:
    """The images of `source`; raises CommandError, which names the file, where they are missing or broken."""
    dataset = (load_fer2013 if source.kind == "csv" else load_folder)(Path(source.path))
    labels = tuple(source.labels or dataset.labels)
    parts = (dataset.train, dataset.validation, dataset.test)
    highest = int(max(part.y.max() for part in parts))
    if highest >= len(labels) or len(labels) < 2:
        raise CommandError(
            f"{source.path}: Expected two classes at least, and a name for each. "
            f"Received: labels up to {highest}, {len(labels)} name(s)"
        )
    dataset = dataset._replace(labels=labels)
    return hold_out(dataset, source.validation, source.seed) if source.validation else dataset


def scaled(x: np.ndarray) -> np.ndarray:
    """Images as the network takes them: float32, where uint8's 0 to 255 becomes 0 to 1."""
    return x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x


def load_folder(folder: Path) -> Dataset:
    """The tutorial's four files. Validation is the test part, as in the tutorial."""
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder. Expected a folder with {FOLDER_EXPECTS}")
    x_train, x_test = _in_one_range(*(_images(folder / f"X_{part}.npy") for part in ("train", "test")))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise CommandError(
            f"{folder / 'X_test.npy'}: Expected images of the shape in X_train.npy, {x_train.shape[1:]}. "
            f"Received: {x_test.shape[1:]}"
        )
    y_train, classes_train = _labels(folder / "y_train.npy", len(x_train))
    y_test, classes_test = _labels(folder / "y_test.npy", len(x_test))
    test = Images(x_test, y_test)
    return Dataset(Images(x_train, y_train), test, test, default_labels(max(classes_train, classes_test)))


def default_labels(classes: int) -> tuple[str, ...]:
    """FER-2013's names where there are seven classes, else the numbers."""
    return FER2013_LABELS if classes == len(FER2013_LABELS) else tuple(map(str, range(classes)))


def _array(path: Path, expected: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file. Expected {expected}") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise CommandError(f"{path}: not a readable .npy file ({error}). Expected {expected}") from None


def _images(path: Path) -> np.ndarray:
    expected = "uint8 or float images (n, height, width) or (n, height, width, channels)"
    array = _array(path, expected)
    if array.ndim not in (3, 4) or 0 in array.shape or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        raise CommandError(f"{path}: Expected {expected}. Received: shape {array.shape}, dtype {array.dtype}")
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype == np.uint8:
        return array
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise CommandError(f"{path}: Expected finite numbers. Received: NaN or infinity in at least one image")
    if array.min() >= 0 and array.max() > 255:
        raise CommandError(f"{path}: Expected floats {FLOATS}. Received: none below 0, the highest {array.max():g}")
    return array


def _in_one_range(*images: np.ndarray) -> list[np.ndarray]:
    """Floats from 0 to 255 brought to 0 to 1: all of them, though one file may hold dark images alone.

    Those with any below 0 were standardised, whatever their highest, and stay as they are.
    """
    floats = [each for each in images if each.dtype != np.uint8]
    if min((each.min() for each in floats), default=0) < 0 or max((each.max() for each in floats), default=0) <= 2:
        return list(images)
    return [each if each.dtype == np.uint8 else each / np.float32(255) for each in images]


def _labels(path: Path, images: int) -> tuple[np.ndarray, int]:
    """int64 labels `[n]`, and how many classes the file speaks of."""
    expected = (
        f"{images} labels: whole numbers from 0 to {MOST_CLASSES - 1}, (n,) or (n, 1), or one-hot rows (n, classes)"
    )
    array = _array(path, expected)
    problem, classes = None, 0
    if array.dtype.kind not in "iufb":
        problem = f"dtype {array.dtype}"
    elif array.ndim not in (1, 2) or len(array) != images or 0 in array.shape:
        problem = f"shape {array.shape}"
    elif array.ndim == 2 and array.shape[1] > 1:
        if not (((array == 0) | (array == 1)).all() and (array.sum(axis=1) == 1).all()):
            problem = "rows that are not one-hot"
        array, classes = array.argmax(axis=1), array.shape[1]
    else:
        array = array.reshape(-1)
        if not ((array >= 0) & (array < MOST_CLASSES) & (array == np.floor(array))).all():
            problem = f"labels that are negative, not whole, or {MOST_CLASSES} and more"
    if problem:
        raise CommandError(f"{path}: Expected {expected}. Received: {problem}")
    return array.astype(np.int64), classes or int(array.max()) + 1


def load_fer2013(path: Path) -> Dataset:
    """FER-2013's CSV: Training, PublicTest to validate, PrivateTest to judge (PublicTest too where there is none)."""
    rows: dict[str, list[tuple[bytes, int]]] = {part: [] for part in FER2013_PARTS.values()}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if not {"emotion", "pixels", "Usage"} <= set(reader.fieldnames or ()):
                raise CommandError(f"{path}: Expected {CSV_EXPECTS}. Received: columns {reader.fieldnames}")
            for row in reader:
                rows[_fer2013_part(path, reader.line_num, row)].append(_fer2013_row(path, reader.line_num, row))
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file. Expected a CSV with {CSV_EXPECTS}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{path}: not a readable CSV ({error}). Expected {CSV_EXPECTS}") from None
    if not rows["train"] or not (rows["validation"] or rows["test"]):
        counts = {name: len(rows[part]) for name, part in FER2013_PARTS.items()}
        raise CommandError(f"{path}: Expected rows for Training and for PublicTest or PrivateTest. Received: {counts}")
    train = _fer2013_images(rows["train"])
    validation = _fer2013_images(rows["validation"] or rows["test"])
    test = _fer2013_images(rows["test"]) if rows["test"] else validation
    return Dataset(train, validation, test, FER2013_LABELS)


def _fer2013_part(path: Path, line: int, row: dict[str, str]) -> str:
    usage = (row["Usage"] or "").strip()
    if usage not in FER2013_PARTS:
        expected = ", ".join(FER2013_PARTS)
        raise CommandError(
            f"{path}, line {line}: Invalid value for Usage. Expected one of {expected}. Received: {usage!r}"
        )
    return FER2013_PARTS[usage]


def _fer2013_row(path: Path, line: int, row: dict[str, str]) -> tuple[bytes, int]:
    try:
        pixels = bytes(map(int, row["pixels"].split()))
        emotion = int(row["emotion"])
        if len(pixels) == FER2013_SIDE**2 and 0 <= emotion < len(FER2013_LABELS):
            return pixels, emotion
        received = f"{len(pixels)} pixels, emotion {emotion}"
    except (ValueError, AttributeError, TypeError) as error:
        received = str(error)
    raise CommandError(f"{path}, line {line}: Expected {CSV_EXPECTS}. Received: {received}")


def _fer2013_images(rows: list[tuple[bytes, int]]) -> Images:
    pixels = np.frombuffer(b"".join(row[0] for row in rows), np.uint8)
    return Images(
        pixels.reshape(len(rows), FER2013_SIDE, FER2013_SIDE, 1), np.array([row[1] for row in rows], np.int64)
    )


def hold_out(dataset: Dataset, part: float, seed: int) -> Dataset:
    """Take a part of the training images, drawn with `seed`, to validate on instead of the images that came for it."""
    held = round(part * len(dataset.train.x))
    if not 0 < held < len(dataset.train.x):
        raise CommandError(
            f"Invalid value for argument `--validation`. Expected images on both sides. Received: {part}"
        )
    order = np.random.default_rng(seed).permutation(len(dataset.train.x))
    out, kept = np.sort(order[:held]), np.sort(order[held:])
    train, validation = (Images(dataset.train.x[at], dataset.train.y[at]) for at in (kept, out))
    return dataset._replace(train=train, validation=validation)


def write_digits(folder: Path, seed: int, held_out: float = 0.2, limit: int | None = None) -> None:
    """Write scikit-learn's digits, brought from 8x8 to 48x48x1 (uint8), as the tutorial's four files."""
    require(sklearn="scikit-learn", PIL="pillow")
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    x = np.stack([np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)) for image in grey])
    x, y = x[:limit, ..., None], digits.target[:limit].astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=held_out, stratify=y, random_state=seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in {"X_train": x_train, "X_test": x_test, "y_train": y_train, "y_test": y_test}.items():
        np.save(folder / f"{name}.npy", array)
