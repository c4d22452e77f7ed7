"""Cases that the fast tier serves, and how a whole operation is held against the float64 reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fastsepconv.kernels import cuda, reference
from tests.tolerances import RELATIVE, relative_error

# What numbers are multiplied as, and the dtype that they are stored in.
DTYPES = {"float32": np.float32, "tf32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FLOATS = ("float32", "bfloat16", "float16")
# TF32 has 11 bits of each factor, which errs by 2^-11 of itself at most where it is rounded. Warpgroups cut it off: by
# 0.7 * 2^-11 on average, towards zero, so that sums keep it. Of two factors that is 7e-4, and single products scatter
# around it by 3e-4, which adds to a sum less than 3e-4 of the largest one.
TOLERANCES = {**RELATIVE, "tf32": 2e-3}

POINTWISE = [(150, 40, 72), (530, 24, 16), (70, 34, 66), (1, 8, 8)]  # rows, channels, filters

WINDOWS = {  # image, padding
    "two segments a row": ((2, 5, 23, 40), "same"),
    "no padding": ((1, 9, 7, 16), "valid"),
    "padding beyond the kernel": ((1, 4, 5, 8), ((4, 0), (0, 5))),
    "one row of many channels": ((3, 1, 4, 264), "same"),
}

SEPARABLE = {  # image, taps, multiplier, stride, filters; whether the depthwise step has a window in registers
    "stride 1": ((2, 5, 23, 40), (3, 3), 1, 1, 24, True),
    "stride 2": ((1, 7, 6, 16), (3, 3), 1, 2, 72, True),
    "five taps": ((1, 5, 4, 8), (5, 5), 1, 1, 8, False),
    "a multiplier, odd channels": ((1, 4, 3, 3), (3, 2), 2, 1, 10, False),
}


def normal(rng, *shapes) -> list[np.ndarray]:
    return [rng.standard_normal(shape) for shape in shapes]


def separable_inputs(rng, g, filters) -> list[np.ndarray]:
    """x and the kernels, such that mid and y are of the size of x."""
    channels = g.channels * g.multiplier
    x, depthwise, pointwise = normal(rng, g.input_shape, g.kernel_shape, (channels, filters))
    return [x, depthwise / np.sqrt(g.kernel_height * g.kernel_width), pointwise / np.sqrt(channels)]


def check(numbers, operation, before, inputs, bias, dy, *, backward=True) -> None:
    """y, held to bounds, and every gradient, written over NaN, against the reference."""
    dtype = DTYPES[numbers]
    *inputs, bias, dy = (array.astype(dtype) for array in (*inputs, bias, dy))
    doubles = [array.astype(np.float64) for array in (*inputs, dy)]
    free = getattr(reference, f"{operation}_forward")(*before, *doubles[:-1], bias)
    bounds = float(free.min() / 2), float(free.max() / 2)
    y = np.full(dy.shape, np.nan, dtype)
    getattr(cuda, f"{operation}_forward")(*before, *inputs, bias, y, bounds)
    results, exact = {"y": y}, {"y": free.clip(*bounds)}
    if backward:
        gradients = [np.full(array.shape, np.nan, dtype) for array in (*inputs, bias)]
        getattr(cuda, f"{operation}_backward")(*before, *inputs, dy, *gradients)
        true = getattr(reference, f"{operation}_backward")(*before, *doubles)
        names = [f"gradient {i}" for i in range(len(gradients))]
        results |= zip(names, gradients, strict=True)
        exact |= zip(names, true, strict=True)
    for name, ours in results.items():
        assert np.isfinite(ours.astype(np.float64)).all(), f"{operation} {name}: not everything was written"
        error = relative_error(ours, exact[name])
        assert error <= TOLERANCES[numbers], f"{operation} {name}: off by {error:.3g} of its largest value"
