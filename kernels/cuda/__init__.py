"""The CUDA kernels, with the names and arguments of the CPU's.

Arrays are C-contiguous and channels-last, of float32, float64, float16 or bfloat16, checked by the caller: all NumPy
arrays, which are copied to the card and back, or all on the card (`device_array.DeviceArray`), which are
used where they are, on their stream. `clamp` is a fused activation: (low, high) bounds of y; `relu_x` asks for
max(x, 0) instead of x. NaN passes both.

The plain kernels serve every call; FASTSEPCONV_CUDA_TIER=fast asks for others where they can (`settings`, `tiers`).
Importing this needs numba-cuda. With NUMBA_ENABLE_CUDASIM=1 the plain kernels run in Numba's simulator.
"""

from __future__ import annotations

from ..geometry import Geometry
from . import row_stack  # noqa: F401  # before all that compiles

# isort: split
from . import memory, tiers

UNBOUNDED = (float("-inf"), float("inf"))
FORWARD_HALVES: frozenset[str] = frozenset()  # that NumPy arrays come in: they come as float32


def depthwise_forward(g: Geometry, x, kernel, bias, out, clamp=UNBOUNDED, relu_x=False) -> None:
    """Fills out `[N,P,Q,C*M]` from x `[N,H,W,C]`, kernel `[R,S,C,M]`, bias `[C*M]` or None."""

    def compute(x, kernel, bias, out, stream) -> None:
        tiers.run("depthwise_forward", g, x, kernel, bias, out, clamp, relu_x, stream)

    memory.run(compute, {"x": x, "depthwise_kernel": kernel, "bias": bias}, {"out": out})


def depthwise_backward(g: Geometry, x, kernel, dy, dx, d_kernel, d_bias) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[N,P,Q,C*M]`."""

    def compute(*operands) -> None:
        tiers.run("depthwise_backward", g, *operands)

    memory.run(
        compute, {"x": x, "depthwise_kernel": kernel, "dy": dy}, {"dx": dx, "d_depthwise": d_kernel, "d_bias": d_bias}
    )


def pointwise_forward(x, kernel, bias, out, clamp=UNBOUNDED) -> None:
    """Fills out `[rows,F]` from x `[rows,K]`, kernel `[K,F]`, bias `[F]` or None."""
    sizes = x.shape[0], *kernel.shape

    def compute(x, kernel, bias, out, stream) -> None:
        tiers.run("pointwise_forward", *sizes, x, kernel, bias, out, clamp, stream)

    memory.run(compute, {"x": x, "pointwise_kernel": kernel, "bias": bias}, {"out": out})


def pointwise_backward(x, kernel, dy, dx, d_kernel, d_bias) -> None:
    """Fills dx, d_kernel and d_bias, each unless None, from dy `[rows,F]`."""
    sizes = x.shape[0], *kernel.shape

    def compute(*operands) -> None:
        tiers.run("pointwise_backward", *sizes, *operands)

    memory.run(
        compute, {"x": x, "pointwise_kernel": kernel, "dy": dy}, {"dx": dx, "d_pointwise": d_kernel, "d_bias": d_bias}
    )


def separable_forward(
    g: Geometry, x, depthwise_kernel, pointwise_kernel, bias, out, clamp=UNBOUNDED, relu_x=False
) -> None:
    """Fills out `[N,P,Q,F]` from x `[N,H,W,C]`, kernels `[R,S,C,M]` and `[C*M,F]`, bias `[F]` or None."""
    filters = pointwise_kernel.shape[1]

    def compute(*operands) -> None:
        *arrays, stream = operands
        tiers.run("separable_forward", g, filters, *arrays, clamp, relu_x, stream)

    inputs = {"x": x, "depthwise_kernel": depthwise_kernel, "pointwise_kernel": pointwise_kernel, "bias": bias}
    memory.run(compute, inputs, {"out": out})


def separable_backward(
    g: Geometry, x, depthwise_kernel, pointwise_kernel, dy, dx, d_depthwise, d_pointwise, d_bias
) -> None:
    """Fills dx, d_depthwise, d_pointwise and d_bias, each unless None, from dy `[N,P,Q,F]`."""
    filters = pointwise_kernel.shape[1]

    def compute(*operands) -> None:
        tiers.run("separable_backward", g, filters, *operands)

    inputs = {"x": x, "depthwise_kernel": depthwise_kernel, "pointwise_kernel": pointwise_kernel, "dy": dy}
    gradients = {"dx": dx, "d_depthwise": d_depthwise, "d_pointwise": d_pointwise, "d_bias": d_bias}
    memory.run(compute, inputs, gradients)
