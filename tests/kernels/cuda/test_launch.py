"""The way to the card without one: what is compiled, kept, packed and asked of the driver, whose double answers."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from fastsepconv.kernels.device_array import DeviceArray, Dtype
from fastsepconv.kernels.geometry import resolve

from .driver_double import CONTEXT, values_at

G = resolve((2, 7, 6, 5), (3, 2, 5, 2), (2, 1), "same", (1, 2))
STREAM = 4242


@pytest.fixture
def arrays(rng):
    return {
        "x": rng.normal(size=G.input_shape).astype("float32"),
        "depthwise": rng.normal(size=G.kernel_shape).astype("float32"),
        "pointwise": rng.normal(size=(10, 3)).astype("float32"),
        "bias": rng.normal(size=3).astype("float32"),
    }


def on_card(double, shape, dtype="float32", stream=STREAM):
    """An array in the double's memory."""
    size = int(np.prod(shape)) * {"float32": 4, "bfloat16": 2}[dtype]
    _, address = double.cuMemAllocAsync(size, stream)
    return DeviceArray(address, shape, (), Dtype(dtype), 0, stream, True, None)


def test_arguments_reach_the_driver_on_the_callers_stream_and_nothing_waits(double):
    from fastsepconv.kernels import cuda

    x, kernel, bias = (on_card(double, shape) for shape in (G.input_shape, G.kernel_shape, (10,)))
    y = on_card(double, G.output_shape)
    double.calls.clear()
    cuda.depthwise_forward(G, x, kernel, bias, y, (0.0, 6.0))
    (launch,) = double.launches
    count = int(np.prod(G.output_shape))
    assert launch == {"grid": (-(-count // 256), 1, 1), "block": (256, 1, 1), "shared": 0, "stream": STREAM}
    expected = [*G, x.address, 0, kernel.address, bias.address, 1, y.address, 0.0, 6.0]
    assert values_at(double.parameters, "q" * 15 + "QiQQiQff") == expected
    assert double.launched_in == CONTEXT
    assert not double.named("cuStreamSynchronize", "cuMemAllocAsync", "cuMemcpyHtoDAsync")
    double.current = CONTEXT
    double.calls.clear()
    cuda.depthwise_forward(G, x, kernel, None, y)
    assert double.calls == ["cuCtxGetCurrent", "cuLaunchKernel"]
    assert values_at(double.parameters, "q" * 15 + "QiQQiQff")[18:20] == [0, 0]


@pytest.mark.parametrize("fails", [False, True], ids=["done", "refused"])
def test_the_callers_current_card_stays_its_own(double, fails):
    """What frameworks take for the current card is the context of the thread."""
    from fastsepconv.kernels import cuda

    double.cards = 2
    arrays = [on_card(double, shape)._replace(device=1) for shape in ((4, 10), (10, 3), (4, 3))]
    in_memory = [np.ones(shape, "float32") for shape in ((4, 10), (10, 3), (4, 3))]
    double.current = 5
    for x, kernel, y in (arrays, in_memory):
        if fails:
            double.fails["cuLaunchKernel"] = double.CUresult.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            cuda.pointwise_forward(x, kernel, None, y)
        assert double.launched_in == CONTEXT + (x is arrays[0])
        assert double.current == 5


def test_streams_are_ordered_and_pointers_asked_on_the_arrays_card(double):
    from fastsepconv import device_arrays

    double.cards, double.current = 2, 5
    first = on_card(double, (4, 10))._replace(device=1)
    device_arrays._order(first, first._replace(stream=9))
    assert double.named("cuEventRecord", "cuStreamWaitEvent") and double.current == 5
    assert device_arrays._card_of("x", first.address, 40) == 0 and double.current == 5


def test_numpy_arrays_are_copied_in_and_out_and_all_memory_is_given_back(double, arrays):
    from fastsepconv.kernels import cuda

    y = np.full((*G.output_shape[:3], 3), np.nan, "float32")
    cuda.separable_forward(G, *arrays.values(), y)
    names = ("cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemcpyDtoHAsync", "cuMemFreeAsync", "cuStreamSynchronize")
    assert double.named(*names) == [
        *["cuMemcpyHtoDAsync"] * 4, *["cuLaunchKernel"] * 2, "cuMemFreeAsync",
        "cuMemcpyDtoHAsync", *["cuMemFreeAsync"] * 5, "cuStreamSynchronize",
    ]  # fmt: skip
    assert not double.memory
    np.testing.assert_array_equal(y, 0)  # what the double's memory holds


def test_every_backward_pass_gives_its_memory_back(double, arrays):
    from fastsepconv.kernels import cuda

    x, depthwise, pointwise, _ = arrays.values()
    dy = np.ones((*G.output_shape[:3], 3), "float32")
    cuda.separable_backward(G, x, depthwise, pointwise, dy, *map(np.empty_like, arrays.values()))
    # mid again; d_x, d_kernel in two stages and d_bias in two, pointwise; then d_x and d_kernel, depthwise
    assert len(double.launches) == 1 + 5 + 3
    assert not double.memory


ASKED_FOR = (
    "`x`, of shape (2, 7, 6, 5)", "`depthwise_kernel`, of shape (3, 2, 5, 2)", "`pointwise_kernel`, of shape (10, 3)",
    "`bias`, of shape (3,)", "`out`, of shape (2, 4, 6, 3)", "intermediate results, which grow with `x`",
)  # fmt: skip


@pytest.mark.parametrize(("which", "what"), list(enumerate(ASKED_FOR, 1)))
def test_out_of_memory_names_the_argument_and_leaves_nothing_behind(double, arrays, which, what):
    from fastsepconv.kernels import cuda

    double.fails["cuMemAllocAsync", which] = double.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    y = np.empty((*G.output_shape[:3], 3), "float32")
    message = rf"memory of card 0 \(A double\) has no room for the \d+ bytes of {re.escape(what)}\.$"
    with pytest.raises(RuntimeError, match=message):
        cuda.separable_forward(G, *arrays.values(), y)
    assert not double.memory


@pytest.mark.parametrize(("which", "what"), list(enumerate(("dx", "d_depthwise", "d_pointwise", "d_bias"), 5)))
def test_gradients_without_room_are_named(double, arrays, which, what):
    from fastsepconv.kernels import cuda

    double.fails["cuMemAllocAsync", which] = double.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    x, depthwise, pointwise, _ = arrays.values()
    dy = np.ones((*G.output_shape[:3], 3), "float32")
    with pytest.raises(RuntimeError, match=rf"has no room for the \d+ bytes of `{what}`, of shape"):
        cuda.separable_backward(G, x, depthwise, pointwise, dy, *map(np.empty_like, arrays.values()))
    assert not double.memory


def test_a_refused_launch_names_the_kernel(double, arrays):
    from fastsepconv.kernels import cuda

    double.fails["cuLaunchKernel"] = double.CUresult.CUDA_ERROR_INVALID_VALUE
    message = r"Launching pointwise_forward\[float32,float32,float32\] on 1 blocks.*CUDA_ERROR_INVALID_VALUE: in the"
    with pytest.raises(RuntimeError, match=message):
        cuda.pointwise_forward(np.ones((3, 10), "float32"), arrays["pointwise"], None, np.empty((3, 3), "float32"))
    assert not double.memory


def test_debugging_raises_where_the_kernel_was_launched_and_lets_a_graph_be(double, monkeypatch):
    from fastsepconv.kernels import cuda
    from fastsepconv.kernels.cuda import launch

    monkeypatch.setattr(launch, "DEBUG", True)
    x, kernel, y = (on_card(double, shape) for shape in ((4, 10), (10, 3), (4, 3)))
    double.fails["cuStreamSynchronize"] = double.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError, match=r"Running pointwise_forward.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.pointwise_forward(x, kernel, None, y)
    double.capturing = True
    cuda.pointwise_forward(x, kernel, None, y)


@pytest.mark.parametrize("copied", [False, True], ids=["on the card", "copied"])
def test_the_kernel_that_failed_is_named_though_nothing_works_any_more(double, monkeypatch, arrays, copied):
    """An error of a kernel's stays: all that is asked of the card afterwards fails for the same reason."""
    from fastsepconv.kernels import cuda
    from fastsepconv.kernels.cuda import launch

    monkeypatch.setattr(launch, "DEBUG", True)
    given, shape = list(arrays.values()), (*G.output_shape[:3], 3)
    out = np.empty(shape, "float32") if copied else on_card(double, shape)
    given = given if copied else [on_card(double, array.shape) for array in given]
    status = double.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    double.fails = {"cuStreamSynchronize": status, "cuMemFreeAsync": status, ("cuCtxSetCurrent", 2): status}
    with pytest.raises(RuntimeError, match=r"^Running depthwise_forward.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        cuda.separable_forward(G, *given, out)


def test_memory_that_cannot_be_given_back_is_told(double, arrays):
    from fastsepconv.kernels import cuda

    double.fails["cuMemFreeAsync"] = double.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError, match=r"^Freeing memory of the card failed"):
        cuda.separable_forward(G, *arrays.values(), np.empty((*G.output_shape[:3], 3), "float32"))


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_a_card_that_is_too_old_is_told(double, capability):
    from fastsepconv.kernels.cuda import driver

    double.capability = capability
    message = f"A double, has compute capability {capability[0]}.{capability[1]}: 8.0 or newer is needed"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        driver.first_device()
    with pytest.raises(RuntimeError, match=r"There is no card 3: the NVIDIA driver sees 1"):
        driver.device(3)


def test_arrays_of_the_computers_own_go_to_the_first_card_that_is_not_too_old(double, arrays):
    from fastsepconv.kernels import cuda

    double.cards, double.capabilities, double.current = 2, {0: (7, 5)}, 5
    cuda.separable_forward(G, *arrays.values(), np.empty((*G.output_shape[:3], 3), "float32"))
    assert double.launched_in == CONTEXT + 1 and double.current == 5
    assert not double.memory


def test_a_kernel_is_compiled_once_and_then_comes_from_the_disk(double, tmp_path):
    from fastsepconv.kernels.cuda import binaries, pointwise

    kernel = pointwise.forward_kernel("float32", "float32", "float32")
    before = dict(binaries.counts)
    first = binaries.get(kernel, (9, 0))
    assert binaries.get(kernel, (9, 0)) == first
    assert binaries.get(kernel, (8, 0)).code != first.code
    assert {name: count - before[name] for name, count in binaries.counts.items()} == {"compiled": 2, "loaded": 1}
    assert first.code.startswith(b"\x7fELF") and "pointwise_forward" in first.entry
    assert len(list(tmp_path.rglob("*.kernel"))) == 2 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("spoiled", [b"", b"x" * 500, None])
def test_a_spoiled_file_is_compiled_again(double, spoiled, tmp_path):
    from fastsepconv.kernels.cuda import binaries, sums

    kernel = sums.part_sums_kernel("float32", "float32")
    first = binaries.get(kernel, (9, 0))
    (file,) = tmp_path.rglob("*.kernel")
    file.write_bytes(file.read_bytes()[:-1] + b"?" if spoiled is None else spoiled)
    compiled = binaries.counts["compiled"]
    again = binaries.get(kernel, (9, 0))
    assert len(again.code) == len(first.code) and "part_sums" in again.entry
    assert binaries.counts["compiled"] == compiled + 1


def test_a_folder_that_cannot_be_written_costs_only_time(double, monkeypatch):
    from fastsepconv.kernels.cuda import binaries, sums

    monkeypatch.setenv("FASTSEPCONV_CACHE_DIR", "/proc/nowhere")
    assert binaries.get(sums.part_sums_kernel("float32", "float32"), (9, 0)).code


def test_another_state_of_the_sources_or_versions_has_a_folder_of_its_own(double, monkeypatch):
    from fastsepconv.kernels.cuda import binaries

    def folder():
        binaries._state.cache_clear()
        return binaries.folder()

    usual, version = folder(), binaries.importlib.metadata.version
    monkeypatch.setattr(binaries.importlib.metadata, "version", lambda name: version(name) + "+another")
    other_version = folder()
    monkeypatch.undo()
    monkeypatch.setattr(binaries, "_sources", lambda place: sorted(place.glob("*.py"))[1:])
    other_sources = folder()
    monkeypatch.undo()
    binaries._state.cache_clear()
    assert len({usual.name, other_version.name, other_sources.name}) == 3


def test_another_toolkit_has_a_folder_of_its_own_even_if_no_package_brought_it(double, monkeypatch, tmp_path):
    from types import SimpleNamespace

    from fastsepconv.kernels.cuda import binaries

    def folder():
        binaries._state.cache_clear()
        return binaries.folder()

    parts = {name: SimpleNamespace(info=str(tmp_path / name)) for name in ("nvvm", "libdevice")}
    monkeypatch.setattr(binaries, "get_cuda_paths", lambda: parts)
    for part in parts.values():
        Path(part.info).write_bytes(b"one")
    first, again = folder(), folder()
    Path(parts["nvvm"].info).write_bytes(b"another")
    other_compiler = folder()
    monkeypatch.setattr(binaries, "_linker_version", lambda: (99, 1))
    other_linker = folder()
    Path(parts["libdevice"].info).unlink()
    assert folder() is None, "what cannot be told from others is not kept"
    monkeypatch.undo()
    binaries._state.cache_clear()
    assert first == again and len({first, other_compiler, other_linker}) == 3


def test_what_ran_is_logged_and_told(double, caplog):
    from fastsepconv.kernels import cuda
    from fastsepconv.kernels.cuda import launch

    ran = []
    launch.listeners.append(ran.append)
    try:
        with caplog.at_level(logging.DEBUG, "fastsepconv.cuda"):
            cuda.pointwise_forward(*(on_card(double, shape, "bfloat16") for shape in ((4, 10), (10, 3))), None,
                                   on_card(double, (4, 3), "bfloat16"))  # fmt: skip
    finally:
        launch.listeners.remove(ran.append)
    assert ran == ["pointwise_forward[bfloat16,bfloat16,bfloat16]"]
    assert caplog.messages == [
        "pointwise_forward[bfloat16,bfloat16,bfloat16] of the plain tier on 1 blocks of 256 threads"
    ]


def test_two_kernels_of_one_name_are_refused(toolkit):
    from fastsepconv.kernels.cuda import launch, sums

    kernel = sums.part_sums_kernel("float32", "float32")
    with pytest.raises(ValueError, match="two kernels of the name part_sums"):
        launch.Kernel(kernel.function, ("float32", "float32"), kernel.parameters)


def test_streams_are_brought_into_order_by_an_event(double):
    from fastsepconv.kernels.cuda import driver

    stream = driver.Stream(STREAM, driver.device(0))
    driver.order_after(stream, STREAM)
    assert not double.named("cuEventRecord")
    driver.order_after(stream, 9)
    assert double.named("cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy") == [
        "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy",
    ]  # fmt: skip
    assert (double.recorded, double.waiting) == (9, STREAM)
