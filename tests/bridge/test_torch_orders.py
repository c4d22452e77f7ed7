"""Gradients of gradients, forward mode, `torch.func`, `torch.compile`, and what PyTorch itself asks of an operator."""

from __future__ import annotations

import itertools

import pytest

from ..tolerances import assert_close
from .torch_cases import KINDS, array, bridge, convolve, gradients, operands, poisoned, torch, twins
from .windows import window_of

__all__ = ["poisoned"]

WINDOW = {"strides": (2, 1), "padding": "same", "dilation_rate": (1, 2)}
SIZES = (2, 4, 5, 3), (2, 3), 2, 3
SMALL = (1, 3, 4, 2), (2, 2), 2, 2


def functions(kind):
    window = window_of(kind, WINDOW)
    return lambda *t: KINDS[kind](*t, **window), lambda *t: convolve(kind, t[:-1], t[-1], **window)


def weights(order, tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(order), dtype=tensor.dtype)


def derivative(function, order):
    """A function whose result depends on all derivatives of `function` up to `order`, each weighted at random."""
    if order == 0:
        return lambda *inputs: (function(*inputs).sin() * weights(0, function(*inputs))).sum()
    lower = derivative(function, order - 1)

    def higher(*inputs):
        parts = torch.autograd.grad(lower(*inputs), inputs, create_graph=True)
        return sum((part**2 * weights(order, part)).sum() for part in parts)

    return higher


def assert_all_close(ours, theirs):
    for part, expected in zip(ours, theirs, strict=True):
        assert_close("derivative", array(part), array(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders(rng, kind, order):
    inputs = [(0.3 * tensor.detach()).requires_grad_() for tensor in operands(rng, kind, *SIZES)]
    ours, theirs = (derivative(function, order - 1) for function in functions(kind))
    assert_all_close(*(torch.autograd.grad(function(*inputs), inputs) for function in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_inputs(rng, kind):
    """Only what is asked for is computed, whichever inputs that are, in both orders."""
    count = len(operands(rng, kind, *SIZES))
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in (1, 2)):
        inputs = [tensor.detach() for tensor in operands(rng, kind, *SIZES)]
        for i in chosen:
            inputs[i].requires_grad_()
        results = []
        for function in functions(kind):
            sources = [inputs[i] for i in chosen]
            first = torch.autograd.grad(function(*inputs).sin().sum(), sources, create_graph=True)
            second = torch.autograd.grad(sum((part**2).sum() for part in first), sources)
            results.append([*first, *second])
        assert_all_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_agree_in_both_modes(rng, kind):
    inputs = operands(rng, kind, *SMALL)
    ours, _ = functions(kind)
    assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, inputs, check_fwd_over_rev=True, fast_mode=True)


FUNC = {
    "grad": lambda f, x, w: torch.func.grad(lambda w: f(x, w).sin().sum())(w),
    "jvp": lambda f, x, w: torch.func.jvp(lambda x, w: f(x, w), (x, w), (x.cos(), w.cos()))[1],
    "vmap": lambda f, x, w: torch.vmap(lambda x: f(x[None], w))(x),
    "gradient of each image": lambda f, x, w: torch.vmap(
        torch.func.grad(lambda w, x: f(x[None], w).sin().sum()), (None, 0)
    )(w, x),
    "jacrev": lambda f, x, w: torch.func.jacrev(lambda w: f(x, w))(w),
    "jacfwd": lambda f, x, w: torch.func.jacfwd(lambda w: f(x, w))(w),
    "forward over reverse": lambda f, x, w: torch.func.hessian(lambda w: f(x, w).sin().sum())(w),
    "reverse over forward": lambda f, x, w: torch.func.grad(
        lambda x: torch.func.jvp(lambda w: f(x, w), (w,), (w.cos(),))[1].sin().sum()
    )(x),
    "dual tensors": lambda f, x, w: _dual(f, x, w),
}


def _dual(f, x, w):
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, x.cos()), w)
        return torch.autograd.forward_ad.unpack_dual(y).tangent


@pytest.mark.parametrize("transform", FUNC)
@pytest.mark.parametrize("kind", KINDS)
def test_func(rng, kind, transform):
    x, *others = (tensor.detach() for tensor in operands(rng, kind, *SMALL))
    ours, theirs = functions(kind)
    results = [FUNC[transform](lambda x, w, f=f: f(x, w, *others[1:]), x, others[0]) for f in (ours, theirs)]
    assert_all_close([results[0]], [results[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_one_graph_for_images_of_any_size(rng, kind):
    ours, theirs = functions(kind)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ours(*t).sin(), backend="aot_eager", fullgraph=True, dynamic=True)
    for image in (SIZES[0], (3, 7, 6, 3), (5, 9, 9, 3)):
        inputs = operands(rng, kind, image, *SIZES[1:])
        y, parts = gradients(compiled, inputs)
        true_y, true = gradients(lambda *t: theirs(*t).sin(), twins(inputs))
        assert_all_close([y, *parts], [true_y, *true])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_finds_no_fault_with_the_operators(rng, kind, dtype):
    *inputs, bias = operands(rng, kind, *SIZES, dtype)
    window = () if kind == "pointwise" else ([2, 1], [1, 2], True, [0, 0, 0, 0])
    forward = getattr(torch.ops.fastsepconv, f"{kind}_conv2d").default
    backward = getattr(torch.ops.fastsepconv, f"{kind}_conv2d_grad").default
    dy = forward(*inputs, bias, *window).detach().requires_grad_()
    for absent in (bias, None):
        torch.library.opcheck(forward, (*inputs, absent, *window))
    for wanted in ([True] * (len(inputs) + 1), [i == 1 for i in range(len(inputs) + 1)]):
        torch.library.opcheck(backward, (*inputs, dy, *window, wanted))


def test_symbolic_tensors_have_shapes(rng):
    x, *others = (tensor.detach().to("meta") for tensor in operands(rng, "separable", *SIZES))
    y = bridge.separable_conv2d(x, *others, **WINDOW)
    assert (y.device.type, tuple(y.shape)) == ("meta", (2, 2, 5, 3))
