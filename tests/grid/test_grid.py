"""The layers and the array API against Keras's own layers and the float64 reference, over every argument.

A pairwise covering of the arguments' values, cases of certain sizes, and 500 drawn by hypothesis. Outputs and all
gradients, eager and in graphs. At the end the run tells what it has seen, and has to have seen everything.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from fastsepconv.kernels.cpu import tiles
from tests.grid import drawn
from tests.grid.cases import GRID, SIZES, STOCK_VALUES, VALUES, Case, exact, pairs_of, possible_pairs
from tests.grid.paths import every_path, paths
from tests.grid.runs import ours, stock
from tests.targets import environment_of
from tests.tolerances import PEER, assert_close, assert_errors_no_worse, relative_error

RANDOM_CASES = 500


@dataclasses.dataclass
class Seen:
    """What the run has seen so far."""

    cases: list[Case] = dataclasses.field(default_factory=list)
    errors: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # (ours, TensorFlow's), float32


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


def hold(case: Case, seen: Seen) -> None:
    """Runs a case and holds it against the reference; against the stock layer too, where that can run it."""
    arrays = case.arrays()
    expected, dy, d_before = exact(case, arrays)
    results = ours(case, arrays, dy, d_before)
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert results[name].dtype == case.dtype
        assert_close(name, results[name], tensor)
    if case.stock_can:
        peers = stock(case, arrays, dy)
        for name, tensor in expected.items():
            error = relative_error(peers[name], tensor)
            assert error <= PEER[case.dtype], f"{name}: the reference is not what Keras computes: {error:.3g}"
        errors = [
            max(relative_error(side[name], expected[name], scale_of(name, d_before)) for name in expected)
            for side in (results, peers)
        ]
        if case.dtype == "float32":
            seen.errors.append(tuple(errors))
            assert_errors_no_worse(*errors)
    seen.cases.append(case)


def scale_of(name: str, d_before: np.ndarray) -> float | None:
    """What the errors of a tensor are held against, if it is not its own largest value.

    The gradient of a bias is a plain sum of as many terms as there are pixels: where it comes out near zero, the
    rounding of its terms decides, and of one number that is luck.
    """
    return np.abs(d_before).sum(axis=(0, 1, 2)).max() if name == "bias" else None


@pytest.mark.parametrize(("values", "by_stock"), [(VALUES, False), (STOCK_VALUES, True)], ids=["all", "stock"])
def test_every_pair_of_values_is_in_the_grid(values, by_stock):
    covered = set().union(*(pairs_of(case) for case in GRID if case.stock_can or not by_stock))
    assert set(possible_pairs(values)) <= covered


@pytest.mark.parametrize("case", [*GRID, *SIZES], ids=[f"{i}" for i in range(len(GRID + SIZES))])
def test_case_of_the_grid(case, seen):
    hold(case, seen)


@hypothesis.settings(
    max_examples=RANDOM_CASES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(case=drawn.cases())
def test_random_cases(seen, case):
    hold(case, seen)


def test_the_run_has_seen_everything(seen, capsys):
    listed = {id(case) for case in (*GRID, *SIZES)}
    drawn_now = sum(id(case) not in listed for case in seen.cases)
    lacking = len(listed) + drawn_now - len(seen.cases)
    if lacking or not drawn_now:
        pytest.skip(f"{lacking} listed cases were not run, {drawn_now} were drawn: some were not selected, or failed")
    assert drawn_now >= RANDOM_CASES // 2  # hypothesis may stop before it has drawn all that it may
    with capsys.disabled():
        compared = sum(case.stock_can for case in seen.cases)
        print(f"\n{len(seen.cases)} cases, {compared} of them against Keras's own layers, tile {tiles.CHOSEN.name}")
    for argument, values in VALUES.items():
        occurred = {getattr(case, argument) for case in seen.cases}
        assert set(values) <= occurred, f"values of {argument} that did not occur"
    missing = every_path() - set().union(*map(paths, seen.cases))
    assert not missing, f"paths not taken: {missing}"
    average = [sum(side) / len(side) for side in zip(*seen.errors, strict=True)]
    assert average[0] <= 2 * average[1], f"on average off by {average[0]:.3g}, TensorFlow by {average[1]:.3g}"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are tiles and a CPU of x86")
@pytest.mark.parametrize("tile", ["avx2", "portable"])
def test_fallback_tile(tile):
    command, root = [sys.executable, "-m", "tests.grid.fallback"], Path(__file__).parents[2]
    process = subprocess.run(command, cwd=root, env=environment_of(tile), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report == {"tile": tile, "cases": len(GRID + SIZES), "not taken": [], "tensorflow": False}
