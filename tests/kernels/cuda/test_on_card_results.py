"""Every operation, pass, dtype and class of shapes on a card, by both tiers, against the reference and cuDNN."""

from __future__ import annotations

import numpy as np
import pytest

from ...on_card import DTYPES, TIERS, call, checked, guarded, healthy, noted, only, placed, torch
from ...tolerances import RELATIVE, ROUNDING_UNIT, relative_error
from .card_cases import SHAPES, Problem, by_cudnn, exact, problem

__all__ = ["healthy"]

pytestmark = pytest.mark.cuda
OPERATIONS = tuple(
    f"{kind}_{way}" for kind in ("depthwise", "pointwise", "separable") for way in ("forward", "backward")
)
NAMES = {"forward": ["y"], "backward": ["d_x", "d_kernel", "d_pointwise", "d_bias"]}
SHIFTED = "32 channels"


def computed(it: Problem, shift: int = 0) -> list:
    """The problem's results on the card, over NaN, nothing beside them written."""
    inputs = it.inputs(lambda tensor: placed(tensor, shift))
    results = [guarded(shape, it.dtype, shift=shift) for shape in it.result_shapes]
    return checked(lambda: call(it.operation, it.before, inputs, [result for result, _ in results]), results)


def errors(results, it: Problem) -> list[float]:
    """Of each result, the largest error as a share of the largest true value."""
    return [
        relative_error(result.double().cpu().numpy(), true) for result, true in zip(results, exact(it), strict=True)
    ]


def assert_right(it: Problem, results: list) -> None:
    """As close to the reference as the tolerance says, or no worse than twice what cuDNN is off by.

    cuDNN has to agree with the reference roughly: then both compute the same thing.
    """
    ours = errors(results, it)
    theirs = errors(by_cudnn(it), it) if it.arrays[0].size else [0.0] * len(ours)
    bound, unit = RELATIVE[it.dtype], ROUNDING_UNIT[it.dtype]
    for i, (error, peer) in enumerate(zip(ours, theirs, strict=True)):
        what = f"result {i} of {it.operation}, {it.case}, {it.dtype}"
        assert peer <= 100 * bound, f"{what}: cuDNN computes something else, off by {peer:.3g}"
        assert error <= max(bound, 2 * peer + unit), (
            f"{what}: off by {error:.3g} of the largest value, cuDNN {peer:.3g}"
        )


def cases():
    """(case, dtype, operation, tier), the tiers next to each other; float64, which is plain, without large images."""
    for shape_class, found in SHAPES.items():
        for case in found:
            for dtype in DTYPES:
                if (shape_class, dtype) == ("xception", "float64") and "19x19" not in case:
                    continue
                for operation in OPERATIONS:
                    for tier in TIERS:
                        name = f"{shape_class}-{case}-{dtype}-{operation}-{tier}"
                        yield pytest.param(case, dtype, operation, tier, id=name)


@pytest.mark.parametrize(("case", "dtype", "operation", "tier"), list(cases()))
def test_is_the_reference(case, dtype, operation, tier):
    it = problem(operation, case, dtype)
    with only(tier), noted(operation, tier, dtype):
        assert_right(it, computed(it))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_begins_at_odd_places(dtype, operation, tier):
    it = problem(operation, SHIFTED, dtype)
    with only(tier), noted(operation, tier, dtype):
        assert_right(it, computed(it, shift=1))


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not name.startswith("depthwise")])
@pytest.mark.parametrize("case", ["96 channels", "Xception 19x19x728-728"])
def test_tf32_on_request(case, operation, monkeypatch):
    """The fast tier's products have 11 bits of each factor where that is asked for, else those of float32."""
    it = problem(operation, case, "float32")
    with only("fast"):
        exact_products = max(errors(computed(it), it))
        monkeypatch.setenv("FASTSEPCONV_TF32", "1")
        short_products = max(errors(computed(it), it))
    assert exact_products <= 2e-5 < short_products <= 2**-9


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_at_every_call(dtype, operation, tier):
    it = problem(operation, "96 channels", dtype)
    with only(tier):
        for first, again in zip(computed(it), computed(it), strict=True):
            assert torch.equal(first, again)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "separable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clamp", [(0.0, np.inf), (-1.0, 6.0)], ids=["relu", "two bounds"])
def test_clamps_and_keeps_nan(dtype, kind, tier, clamp):
    it = problem(f"{kind}_forward", "valid", dtype)
    inputs = it.inputs(placed)
    inputs[0].view(-1)[7] = torch.nan
    free, held = (guarded(it.result_shapes[0], dtype)[0] for _ in range(2))
    with only(tier), noted(it.operation, tier, dtype):
        call(it.operation, it.before, inputs, [free])
        call(it.operation, it.before, inputs, [held], clamp)
        assert free.isnan().any() and not free.isnan().all()
        assert torch.equal(held.nan_to_num(99), free.clamp(*clamp).nan_to_num(99))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["depthwise", "separable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_relu_of_x_first(dtype, kind, tier):
    it = problem(f"{kind}_forward", "96 channels", dtype)
    inputs = it.inputs(placed)
    inputs[0].view(-1)[7] = torch.nan
    y, expected = (guarded(it.result_shapes[0], dtype)[0] for _ in range(2))
    with only(tier), noted(it.operation, tier, dtype):
        call(it.operation, it.before, inputs, [y], relu_x=True)
        call(it.operation, it.before, [inputs[0].clamp(min=0), *inputs[1:]], [expected])
        assert y.isnan().any() and not y.isnan().all()
        assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "separable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_gradients_that_are_wanted(dtype, kind, tier):
    it = problem(f"{kind}_backward", "96 channels", dtype)
    inputs = it.inputs(placed)
    with only(tier), noted(it.operation, tier, dtype):
        everything = computed(it)
        for wanted, expected in enumerate(everything):
            alone = [None] * len(everything)
            alone[wanted], untouched = guarded(expected.shape, dtype)
            call(it.operation, it.before, inputs, alone)
            assert torch.equal(alone[wanted], expected) and untouched()
