"""The committed tables of assembly hold every kernel that the array API or a frozen model can reach, and no other.

What can be reached is found out by calling: each operation of the table of tiers, on every element, in either tier,
with each tile in its turn as the only one that fits, whatever the tiles cost. The calls go all the way to a driver that
stands for NVIDIA's; nothing is compiled.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="pip install 'fastsepconv[cuda13]'")

import fastsepconv
from fastsepconv import device_arrays, dispatch
from fastsepconv.bridge import array_calls
from tests.card_arrays import InterfaceArray

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
CHANNELS = ((16, 24), (6, 10), (3, 5))  # and filters: rows of whole 16 bytes, of half numbers in whole 4 bytes, neither
ORDERS = ("depthwise_pointwise", "pointwise_depthwise")
ACTIVATIONS = (None, "gelu")  # one that follows the kernel, which then writes sums


@pytest.fixture
def ran(double, monkeypatch) -> Iterator[set[str]]:
    """The names of the kernels that are launched, by arrays that lie on the double's only card."""
    from fastsepconv.kernels.cuda import binaries, fast_separable, launch

    monkeypatch.setattr(dispatch, "_obstacle", lambda backend: None)
    dispatch._kernels.cache_clear()  # what can run here is kept; so too below, when nothing of it is true any more
    double.card_of_others = 0
    monkeypatch.setattr(binaries, "get", lambda kernel, capability: binaries.Binary(kernel.name, b""))
    monkeypatch.setattr(fast_separable, "MID_COST", float("inf"))
    names: set[str] = set()
    launch.listeners.append(names.add)
    yield names
    launch.listeners.remove(names.add)
    forget_choices()
    dispatch._kernels.cache_clear()


def forget_choices() -> None:
    from fastsepconv.kernels.cuda import separable_rows, tiles

    for choice in (tiles.pointwise, tiles.kernel_gradient, separable_rows.choose):
        choice.cache_clear()


def on_card(dtype, *shape) -> InterfaceArray:
    return InterfaceArray(np.zeros(shape, dtype))


def call(operation: str, dtype, channels: int, filters: int, stride: int) -> None:
    """The operation by its public function, in every order of its steps and with either kind of activation."""
    kind, _, way = operation.partition("_")
    mixed = {order: channels if order == ORDERS[0] else filters for order in ORDERS}  # channels of the depthwise step
    for order in ORDERS if kind == "separable" else ORDERS[:1]:
        kernels = {
            "depthwise": [on_card(dtype, 3, 3, channels, 1)],
            "pointwise": [on_card(dtype, channels, filters)],
            "separable": [on_card(dtype, 3, 3, mixed[order], 1), on_card(dtype, channels, filters)],
        }[kind]
        options = {} if kind == "pointwise" else {"strides": stride}
        options |= {"order": order} if kind == "separable" else {}
        inputs = [on_card(dtype, 1, 7, 7, channels), *kernels]
        forward = getattr(fastsepconv, f"{kind}_conv2d")
        if way == "forward":
            for activation in ACTIVATIONS:
                forward(*inputs, activation=activation, **options)
            if kind != "pointwise" and order == ORDERS[0]:
                call_after_relu(kind, inputs, stride)
        else:
            getattr(fastsepconv, f"{kind}_conv2d_grad")(*inputs, forward(*inputs, **options), **options)


def call_after_relu(kind: str, inputs: list, stride: int) -> None:
    """The operation on an x that passes a ReLU first, as a frozen model's node computes it."""
    x, *kernels = (device_arrays.read("x", array) for array in inputs)
    window = {"strides": (stride, stride), "dilations": (1, 1), "same": 0, "padding": (0, 0, 0, 0)}
    array_calls.forward(
        dispatch.kernels("cuda"), kind.capitalize(), (x, *kernels), None, window | {"relu_x": 1},
        lambda number, shape: device_arrays.new(x, shape),
    )  # fmt: skip


def call_everything(double, dtypes=DTYPES) -> None:
    from fastsepconv.kernels.cuda import tiers, tiles

    strides = range(1, 2 + max(stride for windows in tiles.WINDOWS.values() for stride in windows))
    for operation, dtype, sizes, stride in itertools.product(tiers.TABLE, dtypes, CHANNELS, strides):
        call(operation, dtype, *sizes, stride)
        double.calls.clear()  # it counts them at each one


def each_tile_alone(monkeypatch) -> Iterator[None]:
    """In each round another one of the tiles that fit is the only one."""
    from fastsepconv.kernels.cuda import tiles

    fitting, gemms = tiles._fitting, tiles.SEPARABLE_GEMMS
    tables = tiles.POINTWISE, tiles.WARPGROUP_POINTWISE
    for n in range(sum(max(map(len, table.values())) for table in tables)):
        monkeypatch.setattr(tiles, "_fitting", lambda *sizes, n=n: fitting(*sizes)[n:][:1] or fitting(*sizes)[:1])
        monkeypatch.setattr(tiles, "SEPARABLE_GEMMS", gemms[n:][:1] or gemms)
        forget_choices()
        yield


def test_the_tables_hold_what_can_be_reached_and_no_more(ran, double, monkeypatch):
    from fastsepconv.kernels.cuda import tiles
    from tests.kernels.cuda import assembly, fast_assembly

    assert double.capability == tiles.HOPPER[:2], "whose cards have the kernels of all others too"
    call_everything(double)
    monkeypatch.setenv("FASTSEPCONV_CUDA_TIER", "fast")
    for _ in each_tile_alone(monkeypatch):
        call_everything(double)
        with monkeypatch.context() as patch:
            patch.setenv("FASTSEPCONV_TF32", "1")
            call_everything(double, DTYPES[:1])
    plain, fast = (json.loads(table.TABLE.read_text()) for table in (assembly, fast_assembly))
    assert ran == {*plain, *fast["kernels"]}
