"""What the tests on a card share: the tier that runs, memory that shows what was not or wrongly written, the ledger.

Whoever imports this module is skipped where PyTorch is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import pytest

from . import ledger

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

TIERS = ("plain", "fast")
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEVICE = "cuda"  # a rehearsal without a card puts "cpu" here
GUARD = 256  # elements before and behind an array that nobody may write to


@pytest.fixture(autouse=True)
def healthy():
    """The card answers after the test. Where it does not, nothing in this process ever will: a worker gives up."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another takes its place
        pytest.fail(f"the card is left with an error: {error}")


@contextmanager
def only(tier: str):
    """Within it the kernels of one tier serve all calls; a call that none of them serves skips the test."""
    from fastsepconv.kernels.cuda import tiers

    def refuse(*arguments):
        pytest.skip(f"the {tier} tier does not serve this call")

    table = {
        operation: (*(row for row in rows if row.tier == tier), tiers.Row("plain", refuse, lambda *arguments: True))
        for operation, rows in tiers.TABLE.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiers, "TABLE", table)
        patch.setenv("FASTSEPCONV_CUDA_TIER", tier)
        yield


@contextmanager
def noted(operation: str, tier: str, dtype: str):
    """Write into the ledger that something begins, and whether it passes: what ends the process begins and no more."""
    note(operation, tier, dtype, "begun")
    try:
        yield
    except pytest.skip.Exception:
        note(operation, tier, dtype, "skipped")
        raise
    except BaseException:
        note(operation, tier, dtype, "failed")
        raise
    note(operation, tier, dtype, "passed")


def note(operation: str, tier: str, dtype: str, event: str) -> None:
    ledger.write(event, operation=operation, tier=tier, dtype=dtype)


def guarded(shape: Sequence[int], dtype: str, shift: int = 0):
    """(an array of NaN, what says whether the memory on both sides is untouched); `shift` spoils its alignment."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * GUARD + shift,), torch.nan, dtype=getattr(torch, dtype), device=DEVICE)
    first = GUARD + shift

    def untouched() -> bool:
        return bool(buffer[:first].isnan().all() and buffer[first + size :].isnan().all())

    return buffer[first : first + size].view(tuple(shape)), untouched


def placed(tensor, shift: int = 0):
    """The tensor on the card, between NaN: what reads past its ends shows."""
    inside, _ = guarded(tensor.shape, str(tensor.dtype).removeprefix("torch."), shift=shift)
    return inside.copy_(tensor)


def call(operation: str, before: tuple, inputs: Sequence, results: Sequence, *more, **named) -> None:
    """A function of the CUDA backend on tensors on the card, on PyTorch's current stream."""
    from fastsepconv.bridge import torch_cuda
    from fastsepconv.kernels import cuda

    getattr(cuda, operation)(*before, *torch_cuda.described([*inputs, *results]), *more, **named)


def checked(run: Callable, results: Sequence[tuple]) -> list:
    """The results (as `guarded` makes them) after `run()`, nothing beside them written."""
    run()
    for _, untouched in results:
        assert untouched(), "memory beside a result was written"
    return [result for result, _ in results]
