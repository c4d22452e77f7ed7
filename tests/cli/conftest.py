"""Small images, and one short run that several tests look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastsepconv.cli import main

SIDE = 16
CLASSES = 3
TINY = ("--num-blocks", "0", "--batch-size", "16", "--momentum", "0.5")


def write_images(folder: Path, train: int = 48, test: int = 16, seed: int = 0, **replaced: np.ndarray) -> Path:
    """The tutorial's four files with images whose class shows in their brightness; `replaced` arrays go in instead."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part, size in {"train": train, "test": test}.items():
        y = np.arange(size) % CLASSES
        x = rng.integers(0, 80, (size, SIDE, SIDE, 1)) + 80 * y[:, None, None, None]
        for name, array in {f"X_{part}": x.astype(np.uint8), f"y_{part}": y}.items():
            np.save(folder / f"{name}.npy", replaced.get(name, array))
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with the tutorial's four files."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run of two epochs; its images are in `images` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images")
    arguments = ["train", "--data", folder / "images", "--out", folder / "run", "--epochs", "2", *TINY]
    assert main([*map(str, arguments), "--labels", "dark,grey,bright"]) == 0
    return folder / "run"


@pytest.fixture
def run_json(capsys):
    """Run a command with --json in this process; returns (exit code, document)."""

    def run(*arguments) -> tuple[int, dict]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run
