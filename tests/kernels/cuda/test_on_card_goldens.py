"""tf.keras's own results, written down before, on a card without TensorFlow: every dtype, both tiers."""

from __future__ import annotations

import pytest

from ... import goldens
from ...on_card import DTYPES, TIERS, call, checked, guarded, healthy, noted, only, placed, torch
from ...tolerances import RELATIVE, relative_error
from .card_cases import geometry

__all__ = ["healthy"]

pytestmark = pytest.mark.cuda
OPERANDS = {
    "separable": ("x", "depthwise_kernel", "pointwise_kernel"),
    "depthwise": ("x", "depthwise_kernel"),
    "pointwise": ("x", "pointwise_kernel"),
}


class Golden:
    """A case's arrays as the backend takes them: pointwise kernels are matrices, their images rows of pixels."""

    def __init__(self, case: str) -> None:
        self.kind, arrays = goldens.kind(case), goldens.load(case)
        self.before: tuple = ()
        if self.kind != "pointwise":
            window = goldens.window(case)
            kernel = arrays["depthwise_kernel"].shape
            steps = window.get("strides", (1, 1)), window.get("padding", "valid"), window.get("dilation_rate", (1, 1))
            g, _ = geometry((arrays["x"].shape, kernel[:2], kernel[3], None, steps))
            self.before = (g,)
        self.arrays = {name: self._flat(name, array) for name, array in arrays.items()}
        self.names = OPERANDS[self.kind]

    def _flat(self, name: str, array):
        rows = self.kind == "pointwise" or name.endswith("pointwise_kernel")
        return array.reshape(-1, array.shape[-1]) if rows and array.ndim > 1 else array

    def run(self, way: str, dtype: str) -> dict:
        """The results by name, computed on the card over NaN."""
        last = "bias" if way == "forward" else "dy"
        inputs = [placed(torch.from_numpy(self.arrays[name]).to(getattr(torch, dtype))) for name in (*self.names, last)]
        wanted = ["y"] if way == "forward" else [f"d_{name}" for name in (*self.names, "bias")]
        results = [guarded(self.arrays[name].shape, dtype) for name in wanted]
        operation = f"{self.kind}_{way}"
        found = checked(lambda: call(operation, self.before, inputs, [result for result, _ in results]), results)
        return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", goldens.CASES)
def test_is_what_keras_computes(case, dtype, way, tier):
    golden = Golden(case)
    with only(tier), noted(f"{golden.kind}_{way}", tier, dtype):
        for name, result in golden.run(way, dtype).items():
            error = relative_error(result.double().cpu().numpy(), golden.arrays[name])
            assert error <= RELATIVE[dtype], f"{name}: off by {error:.3g} of its largest value"
