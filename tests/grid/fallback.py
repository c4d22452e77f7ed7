"""The grid on the tile of this process, by the array API, without TensorFlow: prints what ran, as JSON.

Run as `python -m tests.grid.fallback`, with FASTSEPCONV_TILE or NUMBA_CPU_NAME set.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from fastsepconv.kernels.cpu import threads
from tests.grid.arrays import by_arrays
from tests.grid.cases import GRID, SIZES, exact
from tests.grid.paths import TILE, every_path, paths
from tests.tolerances import assert_close


def main() -> None:
    """Runs every case, into poisoned outputs; an AssertionError ends it."""
    taken, most = set(), threads.get_num_threads()
    for listed in [*GRID, *SIZES]:
        case = dataclasses.replace(listed, run="arrays into")
        threads.set_num_threads(min(case.threads, most))
        arrays = case.arrays()
        expected, _, d_before = exact(case, arrays)
        results = by_arrays(case, arrays, d_before)
        for name in expected:
            assert_close(f"{name} of {case}", results[name], expected[name])
        threads.set_num_threads(most)
        taken |= paths(case)
    report = {"tile": TILE.name, "cases": len(GRID + SIZES), "not taken": sorted(every_path() - taken)}
    print(json.dumps(report | {"tensorflow": "tensorflow" in sys.modules}))


if __name__ == "__main__":
    main()
