"""One case by the array API: no framework needed."""

from __future__ import annotations

import numpy as np

import fastsepconv
from fastsepconv.layout import channels_last, from_channels_last
from tests.grid.cases import Case


def by_arrays(case: Case, arrays: dict[str, np.ndarray], d_before: np.ndarray) -> dict[str, np.ndarray]:
    """{"y": output, "x": its gradient, ...}, channels last. d_before is the gradient before the activation.

    Assumes: case.by_arrays.
    """
    inputs = arrays | {"x": from_channels_last(arrays["x"], case.data_format)}
    d_before = from_channels_last(d_before, case.data_format)
    out = np.full(d_before.shape, np.nan, case.dtype) if case.run == "arrays into" else None
    options = case.options | {"backend": "cpu"}
    y = getattr(fastsepconv, case.function)(**inputs, **options, activation=case.activation, out=out)
    assert out is None or y is out
    inputs.pop("bias", None)
    d_x, *d_others = getattr(fastsepconv, f"{case.function}_grad")(**inputs, dy=d_before, **options)
    results = {"y": channels_last(y, case.data_format), "x": channels_last(d_x, case.data_format)}
    names = [name for name in ("depthwise_kernel", "pointwise_kernel") if name in arrays] + ["bias"]
    results |= dict(zip(names, d_others, strict=True))
    return results if case.use_bias else {name: values for name, values in results.items() if name != "bias"}
