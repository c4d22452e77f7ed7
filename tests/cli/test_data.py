"""Images and labels from files: every form that is promised, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest

from fastsepconv.cli import data, main
from fastsepconv.cli.console import BAD_FILE, CommandError

from .conftest import CLASSES, SIDE, write_images


def load(folder, **kwargs) -> data.Dataset:
    return data.load(data.Source("folder", str(folder), **kwargs))


def test_uint8_becomes_0_to_1_only_when_it_is_used(images):
    dataset = load(images)
    assert dataset.train.x.dtype == np.uint8 and dataset.train.x.shape == (48, SIDE, SIDE, 1)
    scaled = data.scaled(dataset.train.x)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, dataset.train.x.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_stay_or_are_scaled_where_they_were_not(tmp_path, dtype):
    x = np.linspace(0, 1, 16 * SIDE * SIDE).reshape(16, SIDE, SIDE).astype(dtype)
    small = load(write_images(tmp_path / "small", X_test=x))
    large = load(write_images(tmp_path / "large", X_test=(x * 255).astype(dtype)))
    assert small.test.x.dtype == np.float32 and small.test.x.shape == (16, SIDE, SIDE, 1)
    np.testing.assert_array_equal(small.test.x[..., 0], x.astype(np.float32))
    np.testing.assert_allclose(large.test.x, small.test.x, atol=2e-3)


def test_all_floats_are_scaled_where_one_file_is_dark(tmp_path):
    dark = np.full((16, SIDE, SIDE), 1.5)
    dataset = load(write_images(tmp_path, X_train=np.full((48, SIDE, SIDE), 200.0), X_test=dark))
    assert dataset.train.x.max() == np.float32(200) / np.float32(255)
    assert dataset.test.x.max() == np.float32(1.5) / np.float32(255)


@pytest.mark.parametrize("highest", [1.5, 4.0])
def test_standardised_floats_stay_whatever_their_highest(tmp_path, highest):
    x = np.linspace(-2, highest, 48 * SIDE * SIDE).reshape(48, SIDE, SIDE)
    dataset = load(write_images(tmp_path, X_train=x, X_test=np.full((16, SIDE, SIDE), 3.0)))
    np.testing.assert_array_equal(dataset.train.x[..., 0], x.astype(np.float32))
    np.testing.assert_array_equal(dataset.test.x, 3)


def test_floats_of_no_known_range_are_refused(tmp_path):
    with pytest.raises(CommandError, match=r"X_train\.npy: Expected floats from 0 to 1, .* the highest 65535"):
        load(write_images(tmp_path, X_train=np.full((48, SIDE, SIDE), 65535.0)))


@pytest.mark.parametrize("form", ["int64", "uint8", "float32", "column", "one_hot", "one_hot_bool"])
def test_labels_may_be_integers_or_one_hot(tmp_path, form):
    y = np.arange(16) % CLASSES
    one_hot = np.eye(CLASSES)[y]
    forms = {"column": y[:, None], "one_hot": one_hot, "one_hot_bool": one_hot.astype(bool)}
    dataset = load(write_images(tmp_path, y_test=forms[form] if form in forms else y.astype(form)))
    assert dataset.test.y.dtype == np.int64
    np.testing.assert_array_equal(dataset.test.y, y)


def test_a_class_that_no_image_has_is_counted_by_one_hot_labels(tmp_path):
    dataset = load(write_images(tmp_path, y_test=np.eye(5)[np.arange(16) % CLASSES]))
    assert dataset.labels == ("0", "1", "2", "3", "4")


def test_seven_classes_have_fer2013s_names_in_its_order(tmp_path):
    dataset = load(write_images(tmp_path, y_test=np.arange(16) % 7))
    assert dataset.labels == ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")
    named = load(tmp_path, labels=("a", "b", "c", "d", "e", "f", "g"))
    assert named.labels == ("a", "b", "c", "d", "e", "f", "g")


NOT_FINITE = np.full((16, SIDE, SIDE), np.nan)
BROKEN = {
    "rank": ("X_train", np.zeros((48, SIDE), np.uint8)),
    "empty": ("X_train", np.zeros((0, SIDE, SIDE), np.uint8)),
    "signed integers": ("X_train", np.zeros((48, SIDE, SIDE), np.int32)),
    "text": ("X_train", np.full((48, SIDE, SIDE), "a")),
    "not finite": ("X_test", NOT_FINITE),
    "another size": ("X_test", np.zeros((16, SIDE + 1, SIDE), np.uint8)),
    "too few labels": ("y_train", np.zeros(47, int)),
    "negative labels": ("y_train", np.full(48, -1)),
    "halves": ("y_train", np.full(48, 0.5)),
    "NaN labels": ("y_train", np.full(48, np.nan)),
    "infinite labels": ("y_test", np.full(16, np.inf)),
    "one huge label": ("y_test", np.array([2**62] + [0] * 15)),
    "two hot": ("y_test", np.ones((16, CLASSES))),
    "cold": ("y_test", np.zeros((16, CLASSES))),
    "cube of labels": ("y_test", np.zeros((16, 2, 2))),
    "words": ("y_test", np.full(16, "happy")),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_array_is_named_with_what_was_expected(tmp_path, problem, capsys):
    name, array = BROKEN[problem]
    folder = write_images(tmp_path / "images", **{name: array})
    assert main(["train", "--data", str(folder), "--out", str(tmp_path / "run")]) == BAD_FILE
    message = capsys.readouterr().err
    assert f"{name}.npy" in message and "Expected" in message and "Received" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00v\x00{'descr'", b"PK\x03\x04"])
def test_a_file_that_is_no_array_is_named(images, content):
    (images / "y_train.npy").write_bytes(content)
    with pytest.raises(CommandError, match=r"y_train\.npy: .* Expected 48 labels"):
        load(images)


def test_a_truncated_file_is_named(images):
    path = images / "X_train.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CommandError, match=r"X_train\.npy: .* Expected uint8 or float images"):
        load(images)


def test_pickles_are_not_opened(images):
    np.save(images / "y_train.npy", np.array([{"a": 1}] * 48, dtype=object), allow_pickle=True)
    with pytest.raises(CommandError, match=r"y_train\.npy"):
        load(images)


def test_a_missing_file_or_folder_is_named(images, tmp_path):
    (images / "X_test.npy").unlink()
    with pytest.raises(CommandError, match=r"X_test\.npy: no such file. Expected"):
        load(images)
    with pytest.raises(CommandError, match=r"nowhere: no such folder. Expected a folder with X_train\.npy"):
        load(tmp_path / "nowhere")


def test_too_few_names_for_the_classes(images):
    with pytest.raises(CommandError, match="labels up to 2, 2 name"):
        load(images, labels=("a", "b"))


def write_csv(path, rows, header="emotion,pixels,Usage"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def pixels(value: int) -> str:
    return " ".join([str(value)] * 48 * 48)


def test_fer2013s_csv(tmp_path):
    rows = [f"{k % 7},{pixels(k)},Training" for k in range(8)]
    rows += [f"3,{pixels(100)},PublicTest", f"6,{pixels(200)},PrivateTest", f"0,{pixels(201)},PrivateTest"]
    dataset = data.load(data.Source("csv", str(write_csv(tmp_path / "fer2013.csv", rows))))
    assert [len(part.y) for part in (dataset.train, dataset.validation, dataset.test)] == [8, 1, 2]
    assert dataset.train.x.shape == (8, 48, 48, 1) and dataset.train.x.dtype == np.uint8
    assert dataset.train.x[5].min() == dataset.train.x[5].max() == 5
    assert list(dataset.test.y) == [6, 0]
    assert dataset.labels == data.FER2013_LABELS


def test_fer2013s_csv_with_other_spacing_and_no_private_part(tmp_path):
    rows = [f"0, Training, {pixels(1)}", f"1, PublicTest, {pixels(2)}"]
    path = write_csv(tmp_path / "icml.csv", rows, header="emotion, Usage, pixels")
    dataset = data.load(data.Source("csv", str(path)))
    assert dataset.test is dataset.validation and list(dataset.test.y) == [1]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], "emotion,pixels,Usage", r"Expected rows for Training and for PublicTest or PrivateTest"),
        ([], "label,image", r"Expected FER-2013's columns .* Received: columns \['label', 'image'\]"),
        ([f"7,{pixels(1)},Training"], "emotion,pixels,Usage", r"line 2: .* emotion 7"),
        (["0,1 2 3,Training"], "emotion,pixels,Usage", r"line 2: .* 3 pixels"),
        ([f"0,{pixels(256)},Training"], "emotion,pixels,Usage", r"line 2"),
        (["0,a b,Training"], "emotion,pixels,Usage", r"line 2"),
        (["0"], "emotion,pixels,Usage", r"line 2"),
        ([f"0,{pixels(1)},Exam"], "emotion,pixels,Usage", r"line 2: .*Usage. Expected one of Training.* 'Exam'"),
    ],
)
def test_a_broken_csv_is_named_with_its_line(tmp_path, rows, header, message):
    path = write_csv(tmp_path / "fer2013.csv", rows, header)
    with pytest.raises(CommandError, match=rf"fer2013\.csv.*{message}"):
        data.load_fer2013(path)


def test_a_csv_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(CommandError, match=r"none\.csv: no such file. Expected a CSV"):
        data.load_fer2013(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(CommandError, match=r"binary\.csv: not a readable CSV"):
        data.load_fer2013(tmp_path / "binary.csv")


def test_validation_images_are_taken_from_the_training_images(images):
    whole, part = load(images), load(images, validation=0.25, seed=3)
    assert len(part.validation.y) == 12 and len(part.train.y) == 36
    assert part.test is not part.validation
    images_of = [{image.tobytes() for image in each.x} for each in (part.train, part.validation)]
    assert not images_of[0] & images_of[1]
    assert images_of[0] | images_of[1] == {image.tobytes() for image in whole.train.x}
    assert load(images, validation=0.25, seed=3).fingerprint() == part.fingerprint() != whole.fingerprint()


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    data.write_digits(tmp_path, seed=0)
    dataset = load(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"X_train.npy", "X_test.npy", "y_train.npy", "y_test.npy"}
    assert dataset.train.x.shape == (1437, 48, 48, 1) and dataset.test.x.shape == (360, 48, 48, 1)
    counts = np.bincount(dataset.train.y) + np.bincount(dataset.test.y)
    np.testing.assert_array_equal(counts, np.bincount(load_digits().target))
    # shrinking an image back to 8x8 gives the scan: digit and label belong together
    shrunk = dataset.test.x.reshape(360, 8, 6, 8, 6).mean(axis=(2, 4)) * (16 / 255)
    scans, targets = load_digits(return_X_y=True)
    for image, label in zip(shrunk[:20].reshape(20, 64), dataset.test.y, strict=False):
        nearest = np.abs(scans - image).mean(axis=1)
        assert nearest.min() < 1 and targets[nearest.argmin()] == label
