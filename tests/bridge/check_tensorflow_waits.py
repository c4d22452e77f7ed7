"""What TensorFlow's ops on a card ask of the driver, and in which order: run with `exchanged_devices`.

The driver is a double, whose kernels do nothing; TensorFlow, its memory and all code between the two are the real ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf

from fastsepconv.bridge import tensorflow_card
from fastsepconv.kernels.cuda import driver
from tests.bridge.cases import KINDS, gradients, operands
from tests.kernels.cuda.conftest import double, toolkit
from tests.kernels.cuda.driver_double import CONTEXT, values_at

__all__ = ["double", "toolkit"]

CARD_WAITS, OWN_WAITS, LAUNCHES = "cuCtxSynchronize", "cuStreamSynchronize", "cuLaunchKernel"
SIZES = (2, 6, 7, 5), (3, 3), 1, 6
SECOND = 1


@pytest.fixture(autouse=True)
def second_card(double):
    """TensorFlow's memory is that of the second of two cards."""
    double.cards, double.card_of_others = 2, SECOND
    return double


@pytest.fixture
def given(monkeypatch):
    """[(what for, address)] of all memory that TensorFlow gave."""
    api, memory = tensorflow_card._apis[0], []
    for name in ("AllocateOutput", "AllocateTemp"):
        allocate = getattr(api, name)

        def note(*arguments, name=name, allocate=allocate):
            handle = allocate(*arguments)
            memory.append((name, api.TensorData(handle)))
            return handle

        monkeypatch.setattr(api, name, note)
    return memory


def address_of(tensor) -> int:
    return np.asarray(memoryview(tensor)).ctypes.data


def test_kernels_wait_for_tensorflow_and_tensorflow_for_them(rng, second_card):
    inputs = operands(rng, "separable", *SIZES, dtype="float32")
    KINDS["separable"](*inputs)
    # y is given, then mid: each may still be in use, until the card has nothing left to do
    assert second_card.named(CARD_WAITS, LAUNCHES, OWN_WAITS) == [CARD_WAITS, CARD_WAITS, LAUNCHES, LAUNCHES, OWN_WAITS]
    assert second_card.calls[-2:] == [OWN_WAITS, "cuCtxSetCurrent"]
    assert not second_card.named("cuMemAllocAsync", "cuMemFreeAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_waited_for_before_a_launch_and_kept_until_the_kernels_are_done(rng, kind, second_card, monkeypatch):
    order, api = second_card.calls, tensorflow_card._apis[0]
    lent = []

    def allocate(*arguments, name, function):
        handle = function(*arguments)
        order.append(name)
        lent.extend([handle] if name == "AllocateTemp" else [])
        return handle

    def delete(handle, function=api.DeleteTensor):
        if handle in lent:
            lent.remove(handle)
            order.append("given back")
        function(handle)

    for name in ("AllocateOutput", "AllocateTemp"):
        monkeypatch.setattr(api, name, functools.partial(allocate, name=name, function=getattr(api, name)))
    monkeypatch.setattr(api, "DeleteTensor", delete)
    gradients(KINDS[kind], operands(rng, kind, *SIZES, dtype="float32"))
    told = second_card.named("AllocateOutput", "AllocateTemp", CARD_WAITS, LAUNCHES, OWN_WAITS, "given back")
    assert all(after == CARD_WAITS for what, after in itertools.pairwise(told) if what.startswith("Allocate")), told
    ends = [i for i, what in enumerate(told) if what == OWN_WAITS]
    assert len(ends) == 2, "one wait at the end of each operation"
    for begin, end in zip((-1, ends[0]), ends, strict=True):
        operation, following = told[begin + 1 : end], told[end + 1 :]
        count = operation.count("AllocateTemp")
        assert LAUNCHES in operation and following[:count] == ["given back"] * count, told
    assert lent == []


def test_launches_are_given_tensorflows_addresses_on_a_stream_of_their_own(rng, second_card, given):
    x, kernel, bias = operands(rng, "pointwise", *SIZES, dtype="float32")
    y = KINDS["pointwise"](x, kernel, bias)
    (launch,) = second_card.launches
    assert launch["stream"] == driver.PER_THREAD_STREAM and second_card.launched_in == CONTEXT + SECOND
    values = values_at(second_card.parameters, "qqqqQQQiQff")
    assert values[:3] == [84, 5, 6]
    assert values[4:9] == [*map(address_of, (x, kernel, bias)), 1, address_of(y)]
    assert given == [("AllocateOutput", address_of(y))]


@pytest.mark.parametrize("fails", [None, LAUNCHES, OWN_WAITS, CARD_WAITS])
def test_the_threads_card_stays_its_own(rng, second_card, fails):
    """What else runs on TensorFlow's thread, PyTorch say, takes the current card from the thread's context."""
    inputs = operands(rng, "separable", *SIZES, dtype="float32")
    for before in (5, CONTEXT + SECOND):
        second_card.current = before
        if fails:
            second_card.fails[fails] = second_card.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(tf.errors.InternalError) if fails else contextlib.nullcontext():
            KINDS["separable"](*inputs)
        assert second_card.current == before
    assert fails in (CARD_WAITS, LAUNCHES) or second_card.launched_in == CONTEXT + SECOND


def test_the_kernels_own_memory_is_tensorflows(rng, second_card, given):
    x, *weights = operands(rng, "separable", *SIZES, dtype="float64")
    KINDS["separable"](x, *weights)
    (_, y), (use, mid) = given
    values = values_at(second_card.parameters, "qqqqQQQiQdd")
    assert use == "AllocateTemp" and values[4] == mid and values[8] == y


def test_gradients_that_nobody_wants_are_not_computed(rng, second_card):
    inputs = operands(rng, "depthwise", *SIZES, dtype="float32")
    with tf.GradientTape() as tape:
        tape.watch(inputs[0])
        y = KINDS["depthwise"](*inputs)
    second_card.launches.clear()
    tape.gradient(y, inputs[0])
    assert len(second_card.launches) == 1


def test_memory_of_the_computers_own_is_refused(rng, second_card):
    second_card.card_of_others = None
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`x`\. Expected tensors in the memory of a card"):
        KINDS["pointwise"](*operands(rng, "pointwise", *SIZES, dtype="float32"))
    assert not second_card.launches


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (LAUNCHES, r"Launching pointwise_forward.* failed: CUDA_ERROR_ILLEGAL_ADDRESS: in the driver's words"),
        (OWN_WAITS, r"Computing on the card failed: CUDA_ERROR_ILLEGAL_ADDRESS"),
        (CARD_WAITS, r"Waiting for TensorFlow's work on the card failed: CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_what_the_driver_refuses_is_told_by_the_operation(rng, second_card, function, message):
    inputs = operands(rng, "pointwise", *SIZES, dtype="float32")
    second_card.fails[function] = second_card.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(tf.errors.InternalError, match=message):
        KINDS["pointwise"](*inputs)
    assert second_card.calls[-2:] == [OWN_WAITS, "cuCtxSetCurrent"]
    second_card.fails.clear()
    assert KINDS["pointwise"](*inputs).shape == (2, 6, 7, 6)


def test_a_card_that_is_too_old_is_told(rng, second_card):
    second_card.capability = (7, 5)
    with pytest.raises(tf.errors.InternalError, match=r"compute capability 7\.5: 8\.0 or newer is needed"):
        KINDS["pointwise"](*operands(rng, "pointwise", *SIZES, dtype="float32"))
