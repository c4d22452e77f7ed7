"""`fastsepconv predict` on pictures and folders."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from PIL import Image

from fastsepconv.cli import checkpoint, main
from fastsepconv.cli.console import BAD_FILE, USAGE, CommandError
from fastsepconv.cli.predict import read_picture

from .conftest import SIDE


@pytest.fixture
def pictures(tmp_path):
    """A folder with the same grey square in several forms, and a file that is no picture."""
    grey = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE)).astype(np.uint8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / "b.bmp")
    Image.fromarray(grey).resize((64, 40)).save(folder / "c.JPG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_and_a_file(finished_run, pictures, run_json):
    code, document = run_json("predict", pictures, pictures / "a.png", "--model", finished_run / "model.keras")
    assert code == 0
    found = document["images"]
    assert [each["file"].rpartition("/")[2] for each in found] == ["a.png", "b.bmp", "c.JPG", "a.png"]
    x = np.asarray(Image.open(pictures / "a.png"), np.float32)[None, ..., None] / 255
    expected = checkpoint.load(finished_run / "model.keras").predict(x, verbose=0)[0]
    for each in (found[0], found[1], found[3]):
        assert list(each["probabilities"]) == ["dark", "grey", "bright"]
        np.testing.assert_allclose(list(each["probabilities"].values()), expected, rtol=1e-5, atol=1e-7)
        assert each["class"] == expected.argmax() and each["label"] == ["dark", "grey", "bright"][each["class"]]
        assert each["probability"] == max(each["probabilities"].values())


def test_the_table_names_file_and_classes(finished_run, pictures, capsys):
    arguments = ["predict", str(pictures / "a.png"), "--model", str(finished_run / "best.keras"), "--top", "2"]
    assert main([*arguments, "--labels", "x,y,z"]) == 0
    out = capsys.readouterr().out
    assert "a.png" in out and "%" in out and sum(name in out.split() for name in "xyz") == 2


def test_pictures_are_read_upright_grey_and_from_0_to_1(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 8  # the camera was turned: what is stored as left is below
    image.save(tmp_path / "turned.png", exif=exif)
    x = read_picture(tmp_path / "turned.png", 8, 4, 1)
    assert x.shape == (8, 4, 1) and x.dtype == np.float32
    np.testing.assert_array_equal(x[:4], 0)
    np.testing.assert_array_equal(x[4:], 1)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png", 8, 4, 1, invert=True), 1 - x)
    assert read_picture(tmp_path / "turned.png", 5, 6, 3).shape == (5, 6, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_greys_of_16_bits_are_the_same_as_of_8(tmp_path, channels):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "32.tif")
    eight = read_picture(tmp_path / "8.png", 8, 8, channels)
    assert eight.max() == np.float32(252) / np.float32(255)
    for name in ("16.png", "32.tif"):
        np.testing.assert_array_equal(read_picture(tmp_path / name, 8, 8, channels), eight)


@pytest.mark.parametrize("pixels", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 1 << 20, np.int32)])
def test_a_picture_of_no_known_range_is_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "wide.tif")
    with pytest.raises(CommandError, match=r"wide\.tif: not a readable picture \((32-bit floats|greys from)"):
        read_picture(tmp_path / "wide.tif", 8, 8, 1)


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_picture_that_cannot_be_read_is_named(finished_run, tmp_path, content, capsys):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    assert main(["predict", str(path), "--model", str(finished_run / "model.keras")]) == BAD_FILE
    message = capsys.readouterr().err
    assert "broken.png: " in message and "Expected" in message and message.count("\n") == 1


def test_an_empty_folder_is_named(finished_run, tmp_path, capsys):
    assert main(["predict", str(tmp_path), "--model", str(finished_run / "model.keras")]) == BAD_FILE
    assert "Expected a folder with pictures" in capsys.readouterr().err


def test_wrong_models_and_labels(finished_run, pictures, tmp_path, capsys):
    assert main(["predict", str(pictures), "--model", str(tmp_path / "none.keras")]) == BAD_FILE
    assert "none.keras: no such file" in capsys.readouterr().err
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "flat.keras")
    assert main(["predict", str(pictures), "--model", str(tmp_path / "flat.keras")]) == BAD_FILE
    assert "flat.keras: Expected a model of one input" in capsys.readouterr().err
    assert main(["predict", str(pictures), "--model", str(finished_run / "model.keras"), "--labels", "a,b"]) == USAGE
