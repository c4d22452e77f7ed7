"""Cases that hypothesis draws: any sizes, small ones above all."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st

from tests.grid.cases import UNUSED, VALUES, Case, smallest_image


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case; three of four are such that TensorFlow can run them too."""
    by_stock = draw(st.integers(0, 3)) > 0
    arguments = {name: draw(st.sampled_from(values)) for name, values in VALUES.items()}
    size, zeros = st.integers(1, 5), st.integers(0, 4)
    arguments |= {
        "kernel_size": draw(st.tuples(size, size)),
        "strides": draw(st.tuples(size, size)),
        "dilation_rate": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "channels": draw(st.integers(1, 150)),
        "filters": draw(st.integers(1, 100)),
        "batch": draw(st.integers(0, 4)),
    }
    if not isinstance(arguments["padding"], str):
        arguments["padding"] = draw(st.tuples(st.tuples(zeros, zeros), st.tuples(zeros, zeros)))
    if by_stock:
        stride = draw(st.sampled_from((1, 1, 2, 3)))
        arguments |= {
            "strides": (stride, stride),
            "padding": arguments["padding"] if isinstance(arguments["padding"], str) else "valid",
            "dilation_rate": arguments["dilation_rate"] if stride == 1 else (1, 1),
            "batch": max(1, arguments["batch"]),
        }
    least = smallest_image(arguments["kernel_size"], arguments["dilation_rate"], arguments["padding"])
    arguments["image"] = tuple(draw(st.integers(size, size + 24)) for size in least)
    return Case(**arguments | dict.fromkeys(UNUSED.get(arguments["operation"], ())))


def distinct(count: int) -> list[Case]:
    """So many cases, no two alike. Of one seed hypothesis draws as many as it likes: so there are further ones.

    What it likes are, now and then, the constants in the modules that are loaded: alone and in a run of all tests the
    cases are not the same. A case by itself is, to the last bit.
    """
    found: dict[Case, None] = {}
    for seed in itertools.count():

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            phases=[hypothesis.Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(cases())
        def collect(case):
            found.setdefault(case)

        collect()
        if len(found) >= count:
            return list(found)[:count]
