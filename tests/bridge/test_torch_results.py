"""The PyTorch functions' outputs and first gradients, whatever the tensors and wherever they run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import resolve

from ..mappings import advised, wants_huge_pages
from ..tolerances import assert_close
from .torch_cases import (
    CASES,
    KINDS,
    WINDOWS,
    array,
    assert_output_and_gradients,
    bridge,
    convolve,
    gradients,
    operands,
    poisoned,
    torch,
    twins,
)

__all__ = ["poisoned"]

DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients(rng, kind, case, dtype):
    assert_output_and_gradients(rng, kind, case, dtype)


def test_equals_the_reference(rng):
    inputs = operands(rng, "separable", (2, 7, 6, 3), (3, 3), 2, 5)
    x, depthwise, pointwise, bias = map(array, inputs)
    g = resolve(x.shape, depthwise.shape, (2, 2), "same", (1, 1))
    dy = rng.standard_normal((2, 4, 3, 5))
    y, ours = gradients(lambda *t: bridge.separable_conv2d(*t, strides=2, padding="same"), inputs, torch.tensor(dy))
    arrays = x, depthwise, pointwise.reshape(6, 5)
    assert_close("y", array(y), reference.separable_forward(g, *arrays, bias))
    for gradient, true in zip(map(array, ours), reference.separable_backward(g, *arrays, dy), strict=True):
        assert_close("gradient", gradient, true.reshape(gradient.shape))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_order_pointwise_first(rng, data_format):
    x, pointwise, depthwise, bias = (
        torch.tensor(rng.standard_normal(shape)) for shape in ((2, 6, 7, 4), (1, 1, 4, 3), (3, 3, 3, 2), (6,))
    )
    mixed = convolve("pointwise", [x, pointwise])
    expected = convolve("depthwise", [mixed, depthwise], bias, padding="same")
    first = data_format == "channels_first"
    y = bridge.separable_conv2d(
        x.permute(0, 3, 1, 2) if first else x, depthwise, pointwise, bias,
        padding="same", data_format=data_format, order="pointwise_depthwise",
    )  # fmt: skip
    assert_close("y", array(y.permute(0, 2, 3, 1) if first else y), array(expected))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_channels_first(rng, kind, memory):
    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 3), 1, 6)
    first = [inputs[0].detach().permute(0, 3, 1, 2).contiguous(memory_format=memory).requires_grad_(), *inputs[1:]]
    y, (dx, *others) = gradients(lambda *t: KINDS[kind](*t, data_format="channels_first"), first)
    true_y, (true_dx, *true_others) = gradients(lambda *t: convolve(kind, t[:-1], t[-1]), inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close("y", array(y), array(true_y.permute(0, 3, 1, 2)))
    assert_close("dx", array(dx), array(true_dx.permute(0, 3, 1, 2)))
    for gradient, true in zip(others, true_others, strict=True):
        assert_close("gradient", array(gradient), array(true))


class Recorded:
    """Stands for what computes on the CPU: notes the tensors that kernels are given, and lets them compute."""

    def __init__(self, monkeypatch):
        from fastsepconv.bridge import torch_kernels

        self.cpu, self.calls = torch_kernels._DEVICES["cpu"], []
        monkeypatch.setitem(torch_kernels._DEVICES, "cpu", self.cpu._replace(run=self.run))

    def run(self, kind, way, sizes, tensors):
        self.calls.append((way, tensors))
        self.cpu.run(kind, way, sizes, tensors)


def test_kernels_read_and_write_the_tensors_own_memory(rng, monkeypatch):
    recorded = Recorded(monkeypatch)
    inputs = operands(rng, "separable", (2, 6, 7, 5), (3, 3), 1, 6, torch.float32)
    y, parts = gradients(bridge.separable_conv2d, inputs)
    (_, forward), (_, backward) = recorded.calls
    addresses = [tensor.data_ptr() for tensor in inputs]
    assert [tensor.data_ptr() for tensor in forward] == [*addresses, y.data_ptr()]
    assert [tensor.data_ptr() for tensor in backward[:3]] == addresses[:3]
    assert [tensor.data_ptr() for tensor in backward[4:]] == [part.data_ptr() for part in parts]


@pytest.mark.parametrize("wanted", range(4))
def test_only_the_gradients_that_are_wanted_are_computed(rng, monkeypatch, wanted):
    recorded = Recorded(monkeypatch)
    inputs = [tensor.detach() for tensor in operands(rng, "separable", (2, 6, 7, 5), (3, 3), 1, 6)]
    inputs[wanted].requires_grad_()
    bridge.separable_conv2d(*inputs).sum().backward()
    ((_, _), (way, tensors)) = recorded.calls
    assert way == "backward"
    assert [tensor is not None for tensor in tensors[4:]] == [i == wanted for i in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_the_backend_that_was_set(rng, monkeypatch, kind):
    from fastsepconv import dispatch, formulas

    used = []
    for way in ("forward", "backward"):
        function = getattr(formulas, f"{kind}_{way}")
        monkeypatch.setattr(formulas, f"{kind}_{way}", lambda *a, way=way, f=function: (used.append(way), f(*a)))
    monkeypatch.setattr(dispatch, "_chosen", "reference")
    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 3), 2, 6)
    y, ours = gradients(KINDS[kind], inputs)
    true_y, true = gradients(lambda *t: convolve(kind, t[:-1], t[-1]), inputs)
    assert used == ["forward", "backward"] and bridge.status()["backend"] == "reference"
    for ours_tensor, true_tensor in zip([y, *ours], [true_y, *true], strict=True):
        assert_close("tensor", array(ours_tensor), array(true_tensor))


def test_without_bias(rng):
    *inputs, _ = operands(rng, "separable", *WINDOWS["same"][:-1])
    y, ours = gradients(lambda *t: bridge.separable_conv2d(*t, padding="same"), inputs)
    true_y, true = gradients(lambda *t: convolve("separable", t, padding="same"), inputs)
    for ours_tensor, true_tensor in zip([y, *ours], [true_y, *true], strict=True):
        assert_close("tensor", array(ours_tensor), array(true_tensor))


def in_other_memory(tensor):
    """The same values: transposed, in every second place from an odd one on, and as a negation not yet carried out."""
    axes = range(tensor.ndim)
    transposed = tensor.permute(*reversed(axes)).contiguous().permute(*reversed(axes))
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    spread = wide[..., 1::2]
    spread.copy_(tensor)
    negated = torch.complex(tensor, -tensor).conj().imag
    assert negated.is_neg() and not (transposed.is_contiguous() and tensor.ndim > 1)
    return transposed, spread, negated


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_any_order(rng, kind):
    inputs = [tensor.detach() for tensor in operands(rng, kind, (2, 6, 7, 5), (3, 3), 2, 6)]
    expected = KINDS[kind](*inputs)
    for others in zip(*map(in_other_memory, inputs), strict=True):
        np.testing.assert_array_equal(KINDS[kind](*others), expected)


def test_takes_arrays_lists_and_parameters(rng):
    inputs = [array(t) for t in operands(rng, "separable", (1, 5, 5, 2), (3, 3), 1, 3, torch.float32)]
    x, depthwise, pointwise, bias = inputs
    expected = bridge.separable_conv2d(*map(torch.tensor, inputs))
    parameters = [torch.nn.Parameter(torch.tensor(a)) for a in (depthwise, pointwise)]
    y = bridge.separable_conv2d(x, *parameters, bias.tolist())
    np.testing.assert_array_equal(array(y), expected)
    y.sum().backward()
    assert [parameter.grad.shape for parameter in parameters] == [(3, 3, 2, 1), (1, 1, 2, 3)]
    np.testing.assert_array_equal(bridge.pointwise_conv2d(x, [[1.0, 0.0], [0.0, 1.0]]), x)


def test_pointwise_kernel_of_two_dimensions_has_a_gradient_of_two(rng):
    x, depthwise, pointwise, bias = operands(rng, "separable", (1, 5, 5, 2), (3, 3), 2, 3)
    matrix = pointwise.detach()[0, 0].requires_grad_()
    y, (gradient,) = gradients(lambda k: bridge.separable_conv2d(x, depthwise, k, bias), [matrix])
    expected_y, (expected,) = gradients(lambda k: bridge.separable_conv2d(x, depthwise, k, bias), [pointwise])
    np.testing.assert_array_equal(array(y), array(expected_y))
    np.testing.assert_array_equal(gradient, expected[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(rng, kind):
    inputs = operands(rng, kind, (0, 5, 6, 3), (3, 3), 1, 4, torch.float32)
    y, (dx, *others) = gradients(KINDS[kind], inputs)
    assert y.shape[0] == 0 and y.shape[-1] == inputs[-1].shape[0]
    assert dx.shape == (0, 5, 6, 3)
    for gradient in others:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_nan_and_infinity_travel(rng):
    x, depthwise, pointwise, bias = (t.detach() for t in operands(rng, "separable", (1, 6, 6, 2), (3, 3), 1, 3))
    x[0, 0, 0, 0], x[0, 5, 5, 1] = torch.nan, torch.inf
    y = bridge.separable_conv2d(x, depthwise, pointwise, bias)
    expected = convolve("separable", [x, depthwise, pointwise], bias)
    np.testing.assert_array_equal(y.isnan(), expected.isnan())
    np.testing.assert_array_equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_for_pytorchs_own_convolutions(rng, dtype):
    inputs = operands(rng, "separable", (2, 6, 7, 5), (3, 3), 1, 6, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y, ours = gradients(bridge.separable_conv2d, inputs)
        double = bridge.separable_conv2d(*twins(inputs))
    true_y, true = gradients(bridge.separable_conv2d, twins(inputs, dtype))
    assert y.dtype is dtype and double.dtype is torch.float64
    np.testing.assert_array_equal(array(y), array(true_y))
    for gradient, true_gradient in zip(ours, true, strict=True):
        assert gradient.dtype is torch.float32
        np.testing.assert_array_equal(gradient, true_gradient.float())


def test_same_gradients_whatever_the_thread_count(rng):
    from fastsepconv.kernels.cpu import threads

    inputs = operands(rng, "separable", (3, 12, 11, 24), (3, 3), 1, 40, torch.float32)
    count = threads.get_num_threads()
    try:
        results = []
        for n in (1, count):
            threads.set_num_threads(n)
            y, parts = gradients(bridge.separable_conv2d, inputs)
            results.append([y, *parts])
    finally:
        threads.set_num_threads(count)
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(array(one), array(many))


def test_several_threads_at_once(rng):
    inputs = operands(rng, "separable", (2, 14, 13, 24), (3, 3), 1, 40, torch.float32)
    y, expected = gradients(bridge.separable_conv2d, inputs)
    with ThreadPoolExecutor(4) as pool:
        for other, parts in pool.map(lambda _: gradients(bridge.separable_conv2d, inputs), range(24)):
            np.testing.assert_array_equal(array(other), array(y))
            for part, true in zip(parts, expected, strict=True):
                np.testing.assert_array_equal(part, true)


@wants_huge_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_results_come_in_large_pages(dtype):
    x, kernel = torch.zeros((1, 400, 400, 64), dtype=dtype, requires_grad=True), torch.zeros((1, 1, 64, 1), dtype=dtype)
    y = bridge.depthwise_conv2d(x, kernel)
    (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for result in (y, d_x):
        assert advised(result.data_ptr() + result.nbytes // 2)
