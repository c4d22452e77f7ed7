"""The way of PyTorch's tensors on a card to the CUDA kernels, without one: tensors on the CPU pass for some on a card.

Run in Numba's simulator by `test_torch_cuda.py`. The kernels read and write the tensors' memory by its addresses, as on
a card; all that is not run is PyTorch's own code for cards.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from fastsepconv import dispatch
from fastsepconv.bridge import torch_cuda, torch_kernels
from fastsepconv.kernels.cuda import launch
from tests.bridge.torch_cases import (
    CASES,
    KINDS,
    array,
    assert_output_and_gradients,
    convolve,
    gradients,
    operands,
    poisoned,
    torch,
)
from tests.kernels.cuda.simulated.training_step import LAYERS, assert_a_training_step_is_keras
from tests.tolerances import assert_close

__all__ = ["poisoned"]

DTYPES = ["float16", "bfloat16", "float32", "float64"]
CARD = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """[the kernels that ran, the device that was current, what the kernels were given]; streams are numbered."""
    ran, entered, given = [], [], []
    monkeypatch.setattr(dispatch, "obstacle", lambda name: None)
    seam = torch_kernels._kernels_on(CARD)
    monkeypatch.setattr(torch_kernels, "_kernels_on", lambda device: seam)

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch_cuda, "current", current)
    monkeypatch.setattr(torch_cuda, "current_stream", lambda device: 4000 + len(given))
    described = torch_cuda.described
    monkeypatch.setattr(torch_cuda, "described", lambda tensors: given.append(described(tensors)) or list(given[-1]))
    launch.listeners.append(ran.append)
    yield ran, entered, given
    launch.listeners.remove(ran.append)


@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients(rng, kind, case, dtype, card):
    assert_output_and_gradients(rng, kind, case, dtype)
    ran, entered, given = card
    assert any(dtype in name for name in ran), "halves go to the kernels as they are"
    assert entered == [torch.device("cpu")] * 2
    assert [{a.stream for a in arrays if a} for arrays in given] == [{4000}, {4001}]
    assert all(a.dtype.name == dtype and a.writable for arrays in given for a in arrays if a)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_memory_is_taken_where_it_is(rng, kind, card):
    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 3), 1, 6, torch.float32)
    first = inputs[0].detach().permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, (dx, *others) = gradients(lambda *t: KINDS[kind](*t, data_format="channels_first"), [first, *inputs[1:]])
    _, _, (forward, backward) = card
    addresses = [tensor.data_ptr() for tensor in (first, *inputs[1:])]
    assert [a.address for a in forward] == [*addresses, y.data_ptr()]
    assert [a.address for a in backward[: len(inputs) - 1]] == addresses[:-1]
    assert [a.address for a in backward[len(inputs) :]] == [t.data_ptr() for t in (dx, *others)]
    assert all(a.is_contiguous for a in (*forward, *backward))
    assert y.is_contiguous(memory_format=torch.channels_last)
    true_y, true = gradients(lambda *t: convolve(kind, t[:-1], t[-1]), inputs)
    assert_close("y", array(y), array(true_y.permute(0, 3, 1, 2)))
    assert_close("dx", array(dx), array(true[0].permute(0, 3, 1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_computed(rng, kind, card):
    inputs = [tensor.detach() for tensor in operands(rng, kind, (1, 4, 5, 3), (3, 3), 1, 4, torch.float32)]
    inputs[1].requires_grad_()
    KINDS[kind](*inputs).sum().backward()
    _, _, (_, backward) = card
    assert [a is not None for a in backward[len(inputs) :]] == [i == 1 for i in range(len(inputs))]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(rng, kind):
    inputs = operands(rng, kind, (0, 5, 6, 3), (3, 3), 1, 4, torch.float32)
    y, (dx, *others) = gradients(KINDS[kind], inputs)
    assert y.shape[0] == 0 and dx.shape == (0, 5, 6, 3)
    for gradient in others:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("order", ["depthwise_pointwise", "pointwise_depthwise"])
def test_a_training_step_of_xception_leaves_every_weight_as_keras_does(order, monkeypatch, card):
    ran, entered, _ = card
    assert_a_training_step_is_keras(order, monkeypatch, ran)
    assert len(entered) >= 2 * LAYERS


def test_a_backend_that_was_set_for_the_cpu_is_refused(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "obstacle", lambda name: None)
    monkeypatch.setattr(dispatch, "_chosen", "reference")
    with pytest.raises(ValueError, match=r"`backend`\. Expected 'auto' or 'cuda' for arrays on a card"):
        torch_kernels._kernels_on(CARD)
