"""What the PyTorch functions and operators refuse, and in which words."""

from __future__ import annotations

import pytest

from fastsepconv.bridge import autodiff, for_backend

from .torch_cases import KINDS, bridge, operands, torch


@pytest.fixture
def arguments(rng):
    names = ("x", "depthwise_kernel", "pointwise_kernel", "bias")
    tensors = operands(rng, "separable", (2, 6, 7, 4), (3, 3), 2, 5, torch.float32)
    return {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}


KERNEL = "`depthwise_kernel`"
WRONG = {
    "rank": ("x", lambda t: t[0], ValueError, r"`x`. Expected 4 dimensions. Received: x.shape=\(6, 7, 4\)"),
    "channels": (
        "depthwise_kernel",
        lambda t: t[:, :, :3],
        ValueError,
        f"{KERNEL}. Expected 4 input channels",
    ),
    "depth": ("pointwise_kernel", lambda t: t[:, :, 1:], ValueError, "`pointwise_kernel`. Expected 8 input channels"),
    "ones": ("pointwise_kernel", lambda t: t.expand(2, 1, 8, 5), ValueError, r"`pointwise_kernel`. Expected shape \(1"),
    "filters": ("bias", lambda t: t[1:], ValueError, "`bias`. Expected 5 elements"),
    "no taps": ("depthwise_kernel", lambda t: t[:0], ValueError, "`depthwise_kernel`. Expected 4 dimensions, none"),
    "one pixel": (
        "x",
        lambda t: t[:, :2],
        ValueError,
        f"{KERNEL}. Expected a kernel that fits in a 2x7 image",
    ),
    "no pixel": ("x", lambda t: t[:, :0], ValueError, "`depthwise_kernel`. Expected a kernel that fits in"),
    "integers": ("x", lambda t: t.int(), TypeError, "`x`. Expected dtype float16, .* Received: x.dtype=torch.int32"),
    "complex": ("x", lambda t: t.to(torch.complex64), TypeError, "`x`. Expected dtype float16"),
    "dtypes": ("depthwise_kernel", lambda t: t.double(), TypeError, "`depthwise_kernel`. Expected x's dtype"),
    "devices": ("bias", lambda t: t.to("meta"), ValueError, "`bias`. Expected a tensor on x's device, cpu. .*'meta'"),
    "sparse": ("x", lambda t: t.to_sparse(), TypeError, "`x`. Expected a dense tensor"),
}


@pytest.mark.parametrize(("name", "change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_tensors_that_do_not_fit(arguments, name, change, kind, message):
    with pytest.raises(kind, match=f"Invalid value for argument {message}"):
        bridge.separable_conv2d(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize(
    "wrong",
    [
        {"strides": 0},
        {"strides": (1, 2, 3)},
        {"padding": "full"},
        {"padding": ((1, -1), (0, 0))},
        {"dilation_rate": -1},
        {"dilation_rate": 2**30},
        {"data_format": "NHWC"},
        {"order": "depthwise"},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(ValueError, match=f"argument `{name}`"):
        bridge.separable_conv2d(**{"padding": "same", **arguments, **wrong})


def test_a_rank_that_does_not_fit_channels_first(arguments):
    with pytest.raises(ValueError, match=r"`x`\. Expected 4 dimensions"):
        bridge.separable_conv2d(**arguments | {"x": arguments["x"][0]}, data_format="channels_first")


def test_operators_check_too(arguments):
    """They may be called past the functions, and addresses tell neither dtype nor size."""
    x, depthwise, pointwise, bias = arguments.values()
    window = [1, 1], [1, 1], False, [0, 0, 0, 0]
    forward, backward = torch.ops.fastsepconv.separable_conv2d, torch.ops.fastsepconv.separable_conv2d_grad
    dy = forward(x, depthwise, pointwise, bias, *window)
    with pytest.raises(TypeError, match=r"`bias`\. Expected x's dtype"):
        forward(x, depthwise, pointwise, bias.double(), *window)
    with pytest.raises(ValueError, match="`strides`"):
        forward(x, depthwise, pointwise, bias, [-1, 1], *window[1:])
    with pytest.raises(ValueError, match="`padding`"):
        forward(x, depthwise, pointwise, bias, *window[:3], [-2, 0, 0, 3])
    with pytest.raises(ValueError, match=r"`dy`\. Expected an array of shape"):
        backward(x, depthwise, pointwise, dy[:1], *window, [True] * 4)
    with pytest.raises(TypeError, match=r"`dy`\. Expected x's dtype"):
        backward(x, depthwise, pointwise, dy.double(), *window, [True] * 4)
    with pytest.raises(ValueError, match=r"`wanted`\. Expected 4 truth values"):
        backward(x, depthwise, pointwise, dy, *window, [True] * 3)


def test_vmap_over_nothing(arguments):
    x, depthwise, *_ = arguments.values()
    with pytest.raises(ValueError, match=r"one by one\. Expected members"):
        torch.vmap(lambda image: bridge.depthwise_conv2d(image[None], depthwise))(x[:0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_kernels_is_told(rng, monkeypatch, kind):
    from fastsepconv import dispatch
    from fastsepconv.bridge import torch_kernels

    inputs = operands(rng, kind, (2, 6, 7, 5), (3, 3), 1, 6)
    monkeypatch.setattr(torch_kernels, "_DEVICES", {})
    with pytest.raises(RuntimeError, match="where x is, on cpu: there are kernels for the CPU and for CUDA only"):
        KINDS[kind](*inputs)
    without = dispatch.Backend("cuda", "kernels.cuda", lambda: "no CUDA kernels, said the test")
    monkeypatch.setattr(dispatch, "BACKENDS", (without,))
    with pytest.raises(RuntimeError, match=r"cannot compute where x is, on cuda:1: no CUDA kernels, said the test\."):
        torch_kernels._kernels_on(torch.device("cuda", 1))


def test_every_bridge_differentiates():
    assert for_backend("torch") is bridge
    assert {"gradients", "eager", "passing"} <= set(dir(autodiff("torch")))
    assert for_backend("jax") is None and autodiff("jax") is None
