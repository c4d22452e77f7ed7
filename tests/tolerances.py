"""How close is close enough, per dtype, in one place."""

from __future__ import annotations

import numpy as np

# Largest error allowed in a tensor, as a share of its largest true value. The half types are computed in float32,
# so that one rounding is most of what they lose; what lies between two steps bfloat16 may round as well.
RELATIVE = {"float64": 1e-13, "float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# Distance from 1 to the next number of the dtype.
ROUNDING_UNIT = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# Where the float64 reference and the peer differ by more, one of them computes something else.
PEER = {"float64": 1e-12, "float32": 1e-4, "float16": 2.0**-6, "bfloat16": 2.0**-3}

# An element-wise function is within this many rounding units of max(1, |input|, |output|).
ACTIVATION_UNITS = 8

# Central differences in float64 with a step of about 1e-5 lose half of the digits.
FINITE_DIFFERENCE = 1e-7


def assert_close(name: str, ours, exact, times: float = 1, scale: float | None = None) -> None:
    """Hold `ours` against `exact` (float64). NaN and infinities have to stand at the same places.

    The tolerance follows from the dtype of `ours`. A caller that allows it several `times`, or of a `scale`, says why.
    """
    dtype = ours.dtype.name
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(ours[~finite], exact[~finite], err_msg=f"{name}: the non-finite values differ")
    error = relative_error(ours, exact, scale)
    assert error <= times * RELATIVE[dtype], f"{name}: off by {error:.3g} of its largest value ({dtype})"


def assert_no_worse(ours, theirs, exact) -> None:
    """Each a list of runs, a run a list of tensors: ours may err twice as much as theirs, and one rounding unit more.

    The worst tensor of a run counts, on average over the runs: of one small tensor much is luck.
    """
    worst = [
        np.mean([max(map(relative_error, run, truth)) for run, truth in zip(side, exact, strict=True)])
        for side in (ours, theirs)
    ]
    bound = error_allowed(worst[1], ours[0][0].dtype.name)
    assert worst[0] <= bound, f"off by {worst[0]:.3g} of the largest value, the peer by {worst[1]:.3g}"


def error_allowed(theirs: float, dtype: str, times: float = 2) -> float:
    """How much of its largest value a tensor may be off where the peer's is off by `theirs`."""
    return times * theirs + ROUNDING_UNIT[dtype]


def relative_error(values, exact, scale: float | None = None) -> float:
    """max|values - exact| / max|exact| over what is finite, or by `scale`, if one is given."""
    values, exact = np.asarray(values, np.float64), np.asarray(exact, np.float64)
    finite = np.isfinite(exact)
    error = np.abs(values[finite] - exact[finite]).max(initial=0.0)
    return float(error / (scale or np.abs(exact[finite]).max(initial=0.0) or 1.0))
