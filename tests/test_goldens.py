"""The goldens that travel to machines without TensorFlow are what tf.keras computes here and now."""

from __future__ import annotations

import numpy as np
import pytest

import fastsepconv

from . import goldens
from .tolerances import PEER, relative_error


@pytest.mark.parametrize("case", goldens.CASES)
def test_what_is_written_down_is_what_keras_computes(case):
    pytest.importorskip("tensorflow")
    written, computed = goldens.load(case), goldens.by_keras(case)
    assert written.keys() == computed.keys()
    for name, array in computed.items():
        assert relative_error(written[name], array) <= PEER["float64"], name


@pytest.mark.parametrize("case", goldens.CASES)
def test_it_is_what_the_reference_computes_and_every_dtype_holds_the_inputs(case):
    arrays = goldens.load(case)
    weights = [name for name in arrays if name.endswith("_kernel") and not name.startswith("d_")]
    function = getattr(fastsepconv, f"{goldens.kind(case)}_conv2d")
    gradient = getattr(fastsepconv, f"{goldens.kind(case)}_conv2d_grad")
    operands = [arrays[name] for name in ("x", *weights)]
    window = goldens.window(case)
    y = function(*operands, arrays["bias"], **window, backend="reference")
    found = gradient(*operands, arrays["dy"], **window, backend="reference")
    for name, ours in zip(("y", "d_x", *(f"d_{weight}" for weight in weights), "d_bias"), (y, *found), strict=True):
        assert relative_error(ours, arrays[name]) <= PEER["float64"], name
    for name in ("x", *weights, "bias", "dy"):
        np.testing.assert_array_equal(arrays[name].astype(np.float16), arrays[name])
        assert np.abs(8 * arrays[name]).max() <= 16, "more than bfloat16's eight bits"


def test_the_file_is_small():
    assert goldens.FILE.stat().st_size < 2**20
