"""Who computes a problem on a card: this package, PyTorch's libraries, and the float64 truth that both are held to.

A set is the problem's tensors, channels-last: x `[N,H,W,C]`, dy, and kernels in the form each provider keeps them in.
PyTorch sees images as `[N,C,H,W]` in `torch.channels_last` memory, so that nobody copies any.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from .cuda_problems import BACKWARD, FORWARD, TAPS, CudaProblem

Set = dict[str, torch.Tensor]
Step = Callable[[Set], list[torch.Tensor]]  # [y,] [d_x, the gradients of the kernels]
WINDOW = ((1, 1), (1, 1), True, (0, 0, 0, 0))  # as `bridge.static_shapes.window` gives it: SAME, stride 1
COMPILED = (
    728,
    728,
)  # the layers that Xception has most of: torch.compile takes seconds a shape, and fuses little here
_aten: Any = torch.ops.aten


def tensors(problem: CudaProblem, device: str, seed: int) -> Set:
    """A set of random numbers of the problem's dtype."""
    dtype = torch.bfloat16 if problem.numbers == "bfloat16" else torch.float32
    numbers = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, device=device).to(dtype)

    images, channels, filters = (problem.batch, problem.size, problem.size), problem.channels, problem.filters
    found = {"x": random(*images, channels)}
    if problem.mode != FORWARD:
        found["dy"] = random(*images, filters)
    if problem.op != "pointwise":
        found["depthwise"] = random(TAPS, TAPS, channels, 1)
        grouped = found["depthwise"].permute(2, 3, 0, 1)
        found["grouped"] = grouped.contiguous(memory_format=torch.channels_last)
    if problem.op != "depthwise":
        found["pointwise"] = random(channels, filters)
        found["filters"] = found["pointwise"].T.contiguous()[:, :, None, None]
    return found


@contextmanager
def numeric_switch(numbers: str):
    """Within it float32 products may be TF32, or may not, for every provider."""
    allowed, before = numbers == "tf32", torch.backends.cuda.matmul.allow_tf32
    asked = os.environ.get("FASTSEPCONV_TF32")
    torch.backends.cuda.matmul.allow_tf32 = allowed
    os.environ["FASTSEPCONV_TF32"] = str(int(allowed))
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed, benchmark=True):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        del os.environ["FASTSEPCONV_TF32"]
        if asked is not None:
            os.environ["FASTSEPCONV_TF32"] = asked


def providers(problem: CudaProblem) -> dict[str, Step]:
    """The steps of everyone who computes the problem, by name, this package first."""
    found = {"fastsepconv": ours(problem), "cuDNN": cudnn(problem)}
    if problem.op == "pointwise":
        found = {"fastsepconv": found["fastsepconv"], "cuBLAS": cublas()}
    if problem.op == "separable" and problem.mode == FORWARD:
        found["cuDNN + cuBLAS"] = cudnn_and_cublas
    if (problem.op, problem.channels, problem.filters) == ("separable", *COMPILED):
        found["torch.compile"] = compiled(cudnn_and_cublas if problem.mode == FORWARD else found["cuDNN"])
    return found


def ours(problem: CudaProblem) -> Step:
    """This package's operators, as the bridge calls them."""
    from fastsepconv.bridge import torch_kernels

    names = [name for name in ("x", "depthwise", "pointwise") if problem.op in (name, "separable") or name == "x"]
    window = WINDOW if problem.op != "pointwise" else ()

    def step(a: Set) -> list[torch.Tensor]:
        operands, results = [a[name] for name in names], []
        if problem.mode != BACKWARD:
            results.append(torch_kernels.forward(problem.op, operands, None, window))
        if problem.mode != FORWARD:
            wanted = [*[True] * len(operands), False]
            results += torch_kernels.backward(problem.op, operands, a["dy"], window, wanted)[:-1]
        return results

    return step


def cudnn(problem: CudaProblem) -> Step:
    """PyTorch's convolutions, channels_last: cuDNN's, or its own where that has none."""

    def step(a: Set) -> list[torch.Tensor]:
        x, results, mid = _first(a["x"]), [], None
        if problem.op == "separable":
            mid = torch.conv2d(x, a["grouped"], padding=1, groups=problem.channels)
        if problem.mode != BACKWARD:
            results.append(_last(_convolve(problem, x if mid is None else mid, a)))
        if problem.mode != FORWARD:
            results += _gradients(problem, a, x, mid)
        return results

    return step


def _convolve(problem: CudaProblem, images: torch.Tensor, a: Set) -> torch.Tensor:
    if problem.op == "depthwise":
        return torch.conv2d(images, a["grouped"], padding=1, groups=problem.channels)
    return torch.conv2d(images, a["filters"])


def _gradients(problem: CudaProblem, a: Set, x: torch.Tensor, mid: torch.Tensor | None) -> list[torch.Tensor]:
    """The gradients of x and of the kernels, in this package's forms."""
    d_filters, dy = [], _first(a["dy"])
    if mid is not None:
        dy, found, _ = _convolution_backward(dy, mid, a["filters"], padding=0, groups=1)
        d_filters = [found[:, :, 0, 0].T]
    d_x, d_grouped, _ = _convolution_backward(dy, x, a["grouped"], padding=1, groups=problem.channels)
    return [_last(d_x), d_grouped.permute(2, 3, 0, 1), *d_filters]


def _convolution_backward(dy, x, weight, padding: int, groups: int):
    return _aten.convolution_backward(
        dy, x, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], groups, [True, True, False]
    )


def cublas() -> Step:
    """The product of matrices alone."""
    return lambda a: [torch.matmul(a["x"], a["pointwise"])]


def cudnn_and_cublas(a: Set) -> list[torch.Tensor]:
    """The depthwise step as a convolution, the pointwise one as a product of matrices."""
    mid = torch.conv2d(_first(a["x"]), a["grouped"], padding=1, groups=a["x"].shape[-1])
    return [torch.matmul(_last(mid), a["pointwise"])]


def compiled(step: Step) -> Step:
    """The same through torch.compile, compiled at its first call."""
    return torch.compile(step, dynamic=False)


def _first(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2)


def _last(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1)


def truth(problem: CudaProblem, a: Set) -> list[torch.Tensor]:
    """What a step is to return, in float64, tap by tap: of no library's convolution."""
    exact = {name: tensor.double() for name, tensor in a.items()}
    x, margin = exact["x"], TAPS // 2
    size, results = problem.size, []
    padded = torch.nn.functional.pad(x, (0, 0, margin, margin, margin, margin))
    taps = [(r, s, padded[:, r : r + size, s : s + size]) for r in range(TAPS) for s in range(TAPS)]
    mid = x
    if problem.op != "pointwise":
        mid = torch.zeros_like(x)
        for r, s, seen in taps:
            mid += seen * exact["depthwise"][r, s, :, 0]
    if problem.mode != BACKWARD:
        results.append(mid if problem.op == "depthwise" else mid @ exact["pointwise"])
    if problem.mode == FORWARD:
        return results
    d_mid, d_pointwise = exact["dy"], []
    if problem.op == "separable":
        d_pointwise = [mid.flatten(0, 2).T @ exact["dy"].flatten(0, 2)]
        d_mid = exact["dy"] @ exact["pointwise"].T
    d_padded, d_depthwise = torch.zeros_like(padded), torch.zeros_like(exact["depthwise"])
    for r, s, seen in taps:
        d_padded[:, r : r + size, s : s + size] += d_mid * exact["depthwise"][r, s, :, 0]
        d_depthwise[r, s, :, 0] = (d_mid * seen).sum((0, 1, 2))
    d_x = d_padded[:, margin : margin + size, margin : margin + size]
    return [*results, d_x, d_depthwise, *d_pointwise]
