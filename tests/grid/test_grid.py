"""The layers and the array API against Keras's own layers and the float64 reference, over every argument.

A pairwise covering of the arguments' values, cases of certain sizes, and 500 that hypothesis draws beforehand.
Outputs and all gradients, eager and in graphs. At the end the run tells what it has seen, and has to have seen
everything.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsepconv.kernels.cpu import tiles
from tests.grid import drawn
from tests.grid.cases import GRID, SIZES, STOCK_VALUES, VALUES, Case, exact, pairs_of, possible_pairs
from tests.grid.paths import every_path, paths
from tests.grid.runs import ours, stock
from tests.targets import environment_of
from tests.tolerances import PEER, assert_close, error_allowed, relative_error

RANDOM_CASES = 500
DRAWS = 10  # of numbers for a case, where the first is in doubt


@dataclasses.dataclass
class Seen:
    """What the run has seen so far."""

    cases: list[Case] = dataclasses.field(default_factory=list)
    # (dtype, tensor) -> (ours, TensorFlow's) of every case
    errors: dict[tuple[str, str], list[tuple[float, float]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )


@pytest.fixture(scope="session")  # a module's would begin anew after a test of another module in between
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="session")
def random_cases() -> list[Case]:
    return drawn.distinct(RANDOM_CASES)


def hold(case: Case, seen: Seen) -> None:
    """Runs a case and holds it against the reference; against the stock layer too, where that can run it."""
    try:
        errors = compared(case)
        if case.dtype != "float64":  # in which the reference is no exacter than they are
            for name, both in errors.items():
                seen.errors[case.dtype, name].append(both)
                hold_no_worse(case, name, *both)
    except Exception as error:
        error.add_note(str(case))
        raise
    seen.cases.append(case)


def compared(case: Case, draw: int = 0) -> dict[str, tuple[float, float]]:
    """Holds all tensors to their tolerance. Of each the errors (ours, TensorFlow's), if the stock layer can run it."""
    arrays = case.arrays(draw)
    expected, dy, d_before = exact(case, arrays)
    results = ours(case, arrays, dy, d_before)
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert results[name].dtype == case.dtype
        scale = scale_of(name, d_before) if case.roundings > 1 else None
        assert_close(name, results[name], tensor, case.roundings, scale)
    if not case.stock_can:
        return {}
    peers, errors = stock(case, arrays, dy), {}
    for name, tensor in expected.items():
        scale = scale_of(name, d_before)
        our_error, their_error = (relative_error(side[name], tensor, scale) for side in (results, peers))
        assert their_error <= PEER[case.dtype], f"{name}: the reference is not what Keras computes: {their_error:.3g}"
        errors[name] = our_error, their_error
    return errors


def hold_no_worse(case: Case, name: str, our_error: float, their_error: float) -> None:
    """One tensor of a case: ours may err twice as much as TensorFlow's, and one rounding unit more.

    The largest error in one draw of numbers is luck: of a hundred cases in float32 one fails by it. What a case errs
    by is the mean over several draws. A product with a vector, of one filter or of one channel, TensorFlow sums in
    several partial sums, where ours is one chain of up to 256: there up to four times as much has been seen.
    """
    if our_error > error_allowed(their_error, case.dtype):
        draws = [(our_error, their_error), *(compared(case, draw)[name] for draw in range(1, DRAWS))]
        our_error, their_error = np.mean(draws, axis=0)
        kernel = case.arrays().get("pointwise_kernel")
        with_vector = kernel is not None and 1 in kernel.shape[2:]
        bound = error_allowed(their_error, case.dtype, times=4 if with_vector else 2)
        assert our_error <= bound, f"{name}: off by {our_error:.3g} of the largest value, Keras by {their_error:.3g}"


def scale_of(name: str, d_before: np.ndarray) -> float | None:
    """What the errors of a tensor are held against, if it is not its own largest value.

    The gradient of a bias is a plain sum of as many terms as there are pixels: where it comes out near zero, the
    rounding of its terms decides, and of one number that is luck.
    """
    return np.abs(d_before, dtype=np.float64).sum(axis=(0, 1, 2)).max() if name == "bias" else None


@pytest.mark.parametrize(("values", "by_stock"), [(VALUES, False), (STOCK_VALUES, True)], ids=["all", "stock"])
def test_every_pair_of_values_is_in_the_grid(values, by_stock):
    covered = set().union(*(pairs_of(case) for case in GRID if case.stock_can or not by_stock))
    assert set(possible_pairs(values)) <= covered


@pytest.mark.parametrize("case", [*GRID, *SIZES], ids=[f"{i}" for i in range(len(GRID + SIZES))])
def test_case_of_the_grid(case, seen):
    hold(case, seen)


@pytest.mark.parametrize("number", range(RANDOM_CASES))
def test_random_case(number, random_cases, seen):
    hold(random_cases[number], seen)


def test_the_run_has_seen_everything(seen, random_cases, capsys, request):
    lacking = len({*GRID, *SIZES, *random_cases}.difference(seen.cases))
    if lacking:
        cases = test_case_of_the_grid, test_random_case
        selected = sum(getattr(item, "function", None) in cases for item in request.session.items)
        one_process = not hasattr(request.config, "workerinput")
        whole = one_process and selected == len(GRID + SIZES) + RANDOM_CASES
        assert not whole or request.session.testsfailed, f"{lacking} cases were selected, and nobody has seen them"
        pytest.skip(f"{lacking} cases were not run: they were not selected, or failed, or another process had them")
    assert len(set(random_cases)) == RANDOM_CASES
    with capsys.disabled():
        compared = sum(case.stock_can for case in seen.cases)
        print(
            f"\n{len(seen.cases)} cases, {RANDOM_CASES} of them random, {compared} compared with Keras's own layers, "
            f"tile {tiles.CHOSEN.name}"
        )
    for argument, values in VALUES.items():
        occurred = {getattr(case, argument) for case in seen.cases}
        assert set(values) <= occurred, f"values of {argument} that did not occur"
    missing = every_path() - set().union(*map(paths, seen.cases))
    assert not missing, f"paths not taken: {missing}"
    for tensor, errors in seen.errors.items():
        average = np.mean(errors, axis=0)
        assert average[0] <= 2 * average[1], f"{tensor}: on average off by {average[0]:.3g}, Keras by {average[1]:.3g}"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are tiles and a CPU of x86")
@pytest.mark.parametrize("tile", [*(["avx512"] if tiles.CHOSEN.matrices else []), "avx2", "portable"])
def test_fallback_tile(tile):
    command, root = [sys.executable, "-m", "tests.grid.fallback"], Path(__file__).parents[2]
    process = subprocess.run(command, cwd=root, env=environment_of(tile), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report == {"tile": tile, "cases": len(GRID + SIZES), "not taken": [], "tensorflow": False}
