"""The gate: what is right passes, what is wrong in any way is refused, and says which tensor it was."""

from __future__ import annotations

import numpy as np
import pytest

from fastsepconv.bench import data, gate
from fastsepconv.bench.problems import BACKWARD, PREDICT, TRAIN, Layer, Network

LAYER = Layer("xception", 4, 3, 5, mode=BACKWARD)


def outputs(seed=0):
    rng = np.random.default_rng(seed)
    return {"y": rng.standard_normal((1, 4, 4, 5)), "d_x": rng.standard_normal((1, 4, 4, 3)), "d_bias": np.ones(5)}


def verdict(tmp_path, problem, change, which="last"):
    """The gate's sentence when `change` was done to the exact outputs of one weight set."""
    for side in ("reference", "provider"):
        (tmp_path / side).mkdir()
        for name in ("first", "last"):
            arrays = outputs()
            if side == "provider":
                arrays = {key: array.astype(np.float32) for key, array in arrays.items()}
                if name == which:
                    change(arrays)
            data.save(tmp_path / side / name, arrays)
    return gate.check(problem, tmp_path / "reference", tmp_path / "provider")


def wrong_number(arrays):
    arrays["d_x"][0, 1, 2, 1] += 0.01


def half_precision(arrays):
    arrays["y"] = arrays["y"].astype(np.float16)


def not_a_number(arrays):
    arrays["y"][0, 0, 0, 0] = np.nan


def another_layout(arrays):
    arrays["y"] = arrays["y"].transpose(0, 3, 1, 2)


def missing(arrays):
    del arrays["d_bias"]


def test_the_exact_outputs_pass(tmp_path):
    errors, sentence = verdict(tmp_path, LAYER, lambda arrays: None)
    assert sentence is None
    assert errors.keys() == outputs().keys() and max(errors.values()) < 1e-6


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize(
    ("change", "name"),
    [(wrong_number, "d_x"), (half_precision, "y"), (not_a_number, "y"), (another_layout, "y"), (missing, "d_bias")],
)
def test_a_wrong_output_is_refused(tmp_path, change, name, which):
    _, sentence = verdict(tmp_path, LAYER, change, which)
    assert sentence is not None and f"the error of {name} is" in sentence


def test_a_network_is_held_to_its_own_bounds(tmp_path):
    def slightly_off(arrays):
        arrays["d_x"] *= np.float32(1.005)

    predict, train = Network("tutorial", 1, PREDICT), Network("tutorial", 1, TRAIN)
    assert verdict(tmp_path, train, slightly_off)[1] is None
    assert gate.check(predict, tmp_path / "reference", tmp_path / "provider")[1] is not None


def test_a_gradient_of_rounding_errors_counts_by_the_largest_one(tmp_path):
    """A bias before batch normalisation has the gradient 0, and float32 gives something else."""
    for side, noise in (("reference", 0.0), ("provider", 1e-5)):
        (tmp_path / side).mkdir()
        for name in ("first", "last"):
            data.save(tmp_path / side / name, {"d_kernel": np.full(100, 1.0), "d_bias": np.full(3, noise)})
    errors, sentence = gate.check(Network("tutorial", 1, TRAIN), tmp_path / "reference", tmp_path / "provider")
    assert sentence is None and 0 < errors["d_bias"] < 1e-3
