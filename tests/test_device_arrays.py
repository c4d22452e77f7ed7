"""How arrays on a card are understood and refused, by arrays that only say that they lie there."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest

import fastsepconv
from fastsepconv import device_arrays, dispatch

from .card_arrays import HOST, DLPackArray, InterfaceArray

KINDS = {"interface": InterfaceArray, "dlpack": DLPackArray}


@pytest.fixture(autouse=True)
def ordered(monkeypatch):
    """Pairs of streams that were brought into order; each array lies where it says, and no driver is asked."""
    pairs = []
    monkeypatch.setattr(device_arrays, "_order", lambda first, array: pairs.append((first.stream, array.stream)))
    monkeypatch.setattr(device_arrays, "_card_of", lambda name, address, size: 0)
    return pairs


def receive(**arguments):
    return device_arrays.receive(arguments)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_array_is_taken_where_it_is(kind, dtype):
    memory = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    array = receive(x=kind(memory))["x"]
    assert (array.address, array.shape, array.strides) == (memory.ctypes.data, (2, 3, 4), (12, 4, 1))
    assert (array.dtype.name, array.dtype.itemsize, array.device) == (dtype, memory.itemsize, 0)
    assert array.stream == (7 if kind is InterfaceArray else device_arrays.DEFAULT_STREAM)
    assert array.is_contiguous and array.writable and array.owner.array is memory
    assert array.end == memory.ctypes.data + memory.nbytes


def test_bfloat16_comes_through_dlpack():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = receive(x=DLPackArray(np.ones((2, 3), ml_dtypes.bfloat16)))["x"]
    assert (array.dtype.name, array.dtype.itemsize) == ("bfloat16", 2)


def test_dlpack_is_asked_to_have_the_array_ready_for_the_stream_that_reads_it():
    receive(x=DLPackArray(np.ones((2, 3), "f4")))
    assert DLPackArray.asked_for == device_arrays.DEFAULT_STREAM


def test_arrays_in_the_computers_memory_are_left_alone():
    class Pinned(DLPackArray):
        kind = HOST

    for value in (np.ones(3), [1.0, 2.0], Pinned(np.ones(3)), None):
        assert not device_arrays.is_on_card(value)
        assert receive(x=value)["x"] is value


def test_views():
    array = receive(x=InterfaceArray(np.zeros((2, 3, 4, 5), "f4")))["x"]
    first = array.transpose(0, 3, 1, 2)
    assert (first.shape, first.strides, first.is_contiguous) == ((2, 5, 3, 4), (60, 1, 20, 5), False)
    assert first.transpose(0, 2, 3, 1) == array
    assert array.reshape(-1, 5).shape == (24, 5)
    assert array.reshape((6, 20)).strides == (20, 1)
    empty = receive(x=InterfaceArray(np.zeros((0, 3, 4, 5), "f4")))["x"]
    assert empty.is_contiguous and empty.reshape(-1, 5).shape == (0, 5)


def test_streams_are_brought_into_the_order_of_the_first(ordered):
    memory = np.ones((2, 2), "f4")
    given = receive(
        x=InterfaceArray(memory, stream=7),
        kernel=InterfaceArray(memory, stream=9),
        bias=InterfaceArray(memory, stream=7),
    )
    assert ordered == [(7, 9)]
    assert {array.stream for array in given.values()} == {7}
    assert receive(x=InterfaceArray(memory, stream=None))["x"].stream == device_arrays.DEFAULT_STREAM


@pytest.mark.parametrize(
    "change, message",
    [
        ({"typestr": "<i4"}, r"argument `x`\. Expected an array of dtype float16.*x\.dtype='<i4'"),
        ({"typestr": ">f4"}, r"x\.dtype='>f4'"),
        ({"typestr": "<c8"}, r"x\.dtype='<c8'"),
        ({"stream": 0}, r"Expected an array whose stream is not 0.*x\.stream=0"),
        ({"mask": InterfaceArray(np.ones(3))}, "without a mask"),
    ],
)
def test_what_the_interface_says_and_cannot_be_used(change, message):
    class Changed(InterfaceArray):
        @property
        def __cuda_array_interface__(self):
            return super().__cuda_array_interface__ | change

    with pytest.raises((ValueError, TypeError), match=message):
        receive(x=Changed(np.ones((1, 2, 2, 3), "f4")))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_numbers_between_their_places_are_refused(kind):
    """A kernel that reads one there ends with an error after which the card cannot be used any more."""
    memory = np.zeros(66, np.uint8)[2:].view("f4")
    assert memory.ctypes.data % 4
    with pytest.raises(
        ValueError, match=r"argument `x`\. Expected float32 numbers that lie on multiples.*x at address='0x"
    ):
        receive(x=kind(memory))


def test_strides_of_parts_of_numbers_are_refused():
    """Rounded down they would pass for those of a contiguous array."""
    memory = np.zeros(8, np.dtype([("number", "f4"), ("other", "i2")]))["number"]
    assert memory.strides == (6,)
    with pytest.raises(ValueError, match=r"argument `x`\. Expected strides of whole float32 numbers.*=\(6,\)"):
        receive(x=InterfaceArray(memory))


def test_an_interface_that_raises_is_told():
    class NeedsGradient(InterfaceArray):
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("requires grad: use detach()")

    with pytest.raises(TypeError, match=r"argument `x`\. Expected an array that can be used \(requires grad"):
        receive(x=NeedsGradient(np.ones(3)))


def test_integers_through_dlpack_are_refused():
    with pytest.raises(TypeError, match=r"argument `x`.*DLPack's dtype=\(0, 32, 1\)"):
        receive(x=DLPackArray(np.ones(3, "int32")))


def test_arrays_on_two_cards_are_refused():
    memory = np.ones((2, 2), "f4")
    with pytest.raises(ValueError, match=r"argument `dy`\. Expected an array on card 0, where `x` is.*dy on card=1"):
        receive(x=DLPackArray(memory, card=0), dy=DLPackArray(memory, card=1))


def test_arrays_of_two_dtypes_are_refused():
    memory = np.ones((2, 2), "f4")
    with pytest.raises(TypeError, match=r"argument `dy`\. Expected the dtype of `x`, float32.*'float64'"):
        receive(x=InterfaceArray(memory), dy=InterfaceArray(memory.astype("f8")))


def test_a_mix_of_memories_is_refused():
    memory = np.ones((2, 2), "f4")
    on_card = InterfaceArray(memory)
    with pytest.raises(TypeError, match=r"argument `kernel`\. Expected an array on a card, as `x` is.*ndarray"):
        receive(x=on_card, kernel=memory, bias=on_card)
    with pytest.raises(
        TypeError, match=r"argument `kernel`\. Expected an array in the computer's own memory, as `x` is"
    ):
        receive(x=memory, kernel=on_card, bias=None)


def test_a_pointer_to_the_computers_memory_is_refused(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("numba_cuda")
    from fastsepconv.kernels.cuda import driver

    monkeypatch.setattr(driver, "SIMULATED", False)
    monkeypatch.setattr(driver, "device", lambda ordinal: None)
    monkeypatch.setattr(driver, "turned_to", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(driver, "device_of", lambda address: None)
    with pytest.raises(ValueError, match=r"argument `x`\. Expected an array in the memory of a card.*0x"):
        receive(x=InterfaceArray(np.ones((2, 2), "f4")))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_backends_cannot_take_arrays_on_a_card(backend):
    x, kernel = InterfaceArray(np.ones((1, 2, 2, 3), "f4")), InterfaceArray(np.ones((3, 2), "f4"))
    with pytest.raises(ValueError, match=r"argument `backend`\. Expected 'auto' or 'cuda' for arrays on a card"):
        fastsepconv.pointwise_conv2d(x, kernel, backend=backend)


@pytest.mark.skipif("cuda" in dispatch.runnable(), reason="there is CUDA here")
@pytest.mark.parametrize("backend", [None, "auto", "cuda"])
def test_where_cuda_cannot_run_it_is_said_why(backend):
    x, kernel = InterfaceArray(np.ones((1, 2, 2, 3), "f4")), InterfaceArray(np.ones((3, 2), "f4"))
    with pytest.raises(
        ValueError, match=r"argument `backend`\. Expected one that can run here.*(driver|numba-cuda|card)"
    ):
        fastsepconv.pointwise_conv2d(x, kernel, backend=backend)


def test_libraries_whose_arrays_cannot_be_written_are_refused():
    class Immutable(DLPackArray):
        __module__ = "jaxlib._jax"

    array = receive(x=Immutable(np.ones((2, 2), "f4")))["x"]
    with pytest.raises(
        TypeError, match=r"argument `x`\. Expected an array of a library whose arrays can be written to"
    ):
        device_arrays.new(array, (2, 2))


class CupyLike(InterfaceArray):
    """As CuPy's arrays: their device has a number."""

    __module__ = "cupy._core.core"

    def __init__(self, array, card):
        super().__init__(array)
        self.device = types.SimpleNamespace(id=card)


def test_an_empty_array_is_on_the_card_that_its_library_tells():
    x, kernel = CupyLike(np.empty((0, 2, 2, 3), "f4"), 1), CupyLike(np.ones((3, 2), "f4"), 1)
    assert {array.device for array in receive(x=x, kernel=kernel).values()} == {1}


def test_a_result_of_numbas_is_made_on_the_card_of_x(monkeypatch):
    cuda = pytest.importorskip("numba.cuda")
    turned = []

    class OfNumba(InterfaceArray):
        __module__ = "numba.cuda.cudadrv.devicearray"

    class Card:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            turned.append(self.number)

        def __exit__(self, *exception):
            turned.append(None)

    monkeypatch.setattr(cuda, "gpus", [Card(number) for number in range(3)])
    monkeypatch.setattr(
        cuda, "device_array", lambda shape, dtype: turned.append(shape) or OfNumba(np.empty(shape, dtype))
    )
    x = receive(x=OfNumba(np.ones((2, 2), "f4")))["x"]._replace(device=2)
    device_arrays.new(x, (4, 5))
    assert turned == [2, (4, 5), None]
