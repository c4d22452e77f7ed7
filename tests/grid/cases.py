"""The cases of the grid: every argument's values, a pairwise covering of them, and cases of certain sizes.

No framework is imported here: the processes that run the fallback tiles have none.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import Geometry, Padding, Pair, effective_size, resolve

Items = tuple[tuple[str, object], ...]

VALUES: dict[str, tuple] = {
    "operation": ("depthwise_pointwise", "pointwise_depthwise", "depthwise"),
    "kernel_size": ((1, 1), (3, 3), (2, 3), (4, 1), (5, 2)),
    "strides": ((1, 1), (2, 2), (3, 3), (2, 1), (1, 3)),
    "padding": ("valid", "same", ((1, 2), (0, 1)), ((4, 0), (3, 5))),
    "dilation_rate": ((1, 1), (2, 2), (1, 3)),
    "data_format": ("channels_last", "channels_first"),
    "depth_multiplier": (1, 2, 3),
    "activation": (None, "relu", "relu6", "tanh", "sigmoid"),
    "use_bias": (True, False),
    "filters": (1, 7, 32, 45),
    "channels": (1, 3, 16, 33),
    "batch": (0, 1, 3),
    "image": ((9, 7), (10, 24), (31, 13)),
    "dtype": ("float32", "float64"),
    "run": ("eager", "graph", "arrays"),
    "threads": (1, 2),
}

Function = Callable[[np.ndarray], np.ndarray]
# name -> (function, derivative, where the derivative jumps)
ACTIVATIONS: dict[str | None, tuple[Function, Function, tuple[float, ...]]] = {
    None: (lambda v: v, np.ones_like, ()),
    "relu": (lambda v: np.maximum(v, 0), lambda v: (v > 0) * 1.0, (0,)),
    "relu6": (lambda v: np.clip(v, 0, 6), lambda v: ((v > 0) & (v < 6)) * 1.0, (0, 6)),
    "tanh": (np.tanh, lambda v: 1 - np.tanh(v) ** 2, ()),
    "sigmoid": (lambda v: 1 / (1 + np.exp(-v)), lambda v: np.exp(-v) / (1 + np.exp(-v)) ** 2, ()),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: the arguments, the sizes, and how it is run. `filters` is None for "depthwise"."""

    operation: str
    kernel_size: Pair
    strides: Pair
    padding: Padding
    dilation_rate: Pair
    data_format: str
    depth_multiplier: int
    activation: str | None
    use_bias: bool
    filters: int | None
    channels: int
    batch: int
    image: Pair
    dtype: str
    run: str
    threads: int

    @property
    def is_possible(self) -> bool:
        """Whether the kernel fits the padded image."""
        g = self.geometry
        return g.out_height > 0 and g.out_width > 0

    @property
    def layer_can(self) -> bool:
        """Whether Keras's constructor takes the arguments; TensorFlow tensors and NumPy arrays take them all."""
        return isinstance(self.padding, str) and (max(self.strides) == 1 or max(self.dilation_rate) == 1)

    @property
    def stock_can(self) -> bool:
        """Whether TensorFlow's CPU kernels can run the stock layer, backward too (on images transposed to NHWC)."""
        return self.layer_can and self.strides[0] == self.strides[1] and self.batch > 0

    @property
    def geometry(self) -> Geometry:
        """Of the depthwise step."""
        inputs = self.filters if self.operation == "pointwise_depthwise" else self.channels
        return resolve(
            (self.batch, *self.image, inputs),
            (*self.kernel_size, inputs, self.depth_multiplier),
            self.strides,
            self.padding,
            self.dilation_rate,
        )

    @property
    def window(self) -> dict:
        """The arguments of a function that convolves."""
        names = ("strides", "padding", "dilation_rate", "data_format")
        return {name: getattr(self, name) for name in names}

    def arrays(self) -> dict[str, np.ndarray]:
        """x `[N,H,W,C]`, the kernels, the bias: seeded by the case, scaled so that outputs are about 1."""
        random = np.random.default_rng(zlib.crc32(repr(self).encode()))
        g = self.geometry
        mixed = self.channels if self.operation == "pointwise_depthwise" else g.channels * g.multiplier
        shapes = {"x": (self.batch, *self.image, self.channels), "depthwise_kernel": g.kernel_shape}
        if self.filters is not None:
            shapes["pointwise_kernel"] = (1, 1, mixed, self.filters)
        if self.use_bias:
            last = self.filters if self.operation == "depthwise_pointwise" else g.output_shape[-1]
            shapes["bias"] = (last,)
        terms = {"depthwise_kernel": g.kernel_height * g.kernel_width, "pointwise_kernel": mixed}
        return {
            name: (random.standard_normal(shape) / terms.get(name, 1) ** 0.5).astype(self.dtype)
            for name, shape in shapes.items()
        }


def exact(case: Case, arrays: dict[str, np.ndarray]) -> tuple[dict, np.ndarray, np.ndarray]:
    """By the reference: {"y": output, "x": its gradient, ...}, dy, and the gradient before the activation.

    dy is zero where the activation's slope jumps: which side of the jump a sum falls on is a matter of rounding.
    """
    g = case.geometry
    x, depthwise = arrays["x"], arrays["depthwise_kernel"]
    pointwise = arrays["pointwise_kernel"][0, 0] if "pointwise_kernel" in arrays else None
    kernels = [depthwise, pointwise] if case.operation == "depthwise_pointwise" else [depthwise]
    forward, backward = {
        "depthwise_pointwise": (reference.separable_forward, reference.separable_backward),
        "pointwise_depthwise": (reference.depthwise_forward, reference.depthwise_backward),
        "depthwise": (reference.depthwise_forward, reference.depthwise_backward),
    }[case.operation]
    inputs = reference.pointwise_forward(x, pointwise) if case.operation == "pointwise_depthwise" else x
    before = forward(g, inputs, *kernels, arrays.get("bias"))
    function, slope, jumps = ACTIVATIONS[case.activation]
    random = np.random.default_rng(1)
    dy = random.standard_normal(before.shape).astype(case.dtype)
    for jump in jumps:
        dy[np.abs(before - jump) < 1e-4] = 0
    d_before = dy * slope(before)
    d_inputs, d_depthwise, *d_pointwise, d_bias = backward(g, inputs, *kernels, d_before)
    if case.operation == "pointwise_depthwise":
        d_inputs, *d_pointwise = reference.pointwise_backward(x, pointwise, d_inputs)[:2]
    results = {"y": function(before), "x": d_inputs, "depthwise_kernel": d_depthwise}
    if d_pointwise:
        results["pointwise_kernel"] = d_pointwise[0][None, None]
    return results | ({"bias": d_bias} if case.use_bias else {}), dy, d_before


# The values that TensorFlow's kernels can take; a second covering of these alone compares every pair with Keras.
STOCK_VALUES = VALUES | {
    "strides": ((1, 1), (2, 2), (3, 3)),
    "padding": ("valid", "same"),
    "batch": (1, 3),
}


def pairwise(values: dict[str, tuple], possible: Callable[[Case], bool]) -> list[Case]:
    """A short list of possible cases in which every pair of values occurs: the greedy choice, always the same."""
    random = np.random.default_rng(0)
    missing = dict.fromkeys(possible_pairs(values))  # in their order, so that the choice is always the same
    cases = []
    while missing:
        candidates = filter(possible, (_drawn(values, next(iter(missing)), random) for _ in range(50)))
        best = max(candidates, key=lambda case: len(missing.keys() & pairs_of(case)))
        for pair in missing.keys() & pairs_of(best):
            del missing[pair]
        cases.append(best)
    return cases


def possible_pairs(values: dict[str, tuple]) -> Iterator[Items]:
    """Every two arguments' values that some case has."""
    for first, second in itertools.combinations(values, 2):
        for a, b in itertools.product(values[first], values[second]):
            filters_of_depthwise = (first, a, second) == ("operation", "depthwise", "filters")
            # Keras's constructor refuses these together
            strides_with_dilation = values is STOCK_VALUES and (first, second) == ("strides", "dilation_rate")
            if not filters_of_depthwise and not (strides_with_dilation and max(a) > 1 and max(b) > 1):
                yield (first, a), (second, b)


def pairs_of(case: Case) -> set[Items]:
    """Every two arguments' values that this case has."""
    return set(itertools.combinations(((name, getattr(case, name)) for name in VALUES), 2))


def _drawn(values: dict[str, tuple], items: Items, random: np.random.Generator) -> Case:
    """A case with these arguments' values, the others drawn."""
    drawn = {name: options[random.integers(len(options))] for name, options in values.items()} | dict(items)
    if "filters" in dict(items):
        drawn["operation"] = dict(items).get("operation", "depthwise_pointwise")
    if drawn["operation"] == "depthwise":
        drawn["filters"] = None
    return Case(**drawn)


def smallest_image(kernel_size: Pair, dilation_rate: Pair, padding: Padding) -> Pair:
    """The smallest image (H, W) that gives an output."""
    if padding == "same":
        return 1, 1
    pads = (0, 0) if padding == "valid" else tuple(map(sum, padding))
    spans = (effective_size(*pair) for pair in zip(kernel_size, dilation_rate, strict=True))
    return tuple(max(1, span - pad) for span, pad in zip(spans, pads, strict=True))


_PLAIN = Case(
    operation="depthwise_pointwise", kernel_size=(3, 3), strides=(1, 1), padding="same", dilation_rate=(1, 1),
    data_format="channels_last", depth_multiplier=1, activation=None, use_bias=True, filters=64, channels=160,
    batch=1, image=(40, 40), dtype="float32", run="eager", threads=2,
)  # fmt: skip

# What takes certain sizes: every number of rows that a tile can leave over; outputs past the caches, sums in several
# parts, several images to a part, more parts than one; lines that are all border, and borders wider than a tap.
SIZES = [
    *[dataclasses.replace(_PLAIN, image=(1, width), channels=9, run="arrays") for width in range(15, 29)],
    dataclasses.replace(_PLAIN, filters=256, channels=24, image=(160, 161)),
    dataclasses.replace(_PLAIN, filters=48, channels=256, batch=5, image=(52, 52), use_bias=False),
    dataclasses.replace(_PLAIN, channels=272, filters=33, image=(21, 23), threads=1, run="graph"),
    dataclasses.replace(_PLAIN, filters=112, image=(29, 31), dtype="float64", operation="pointwise_depthwise"),
    dataclasses.replace(_PLAIN, filters=None, operation="depthwise", batch=37, channels=40, image=(6, 7)),
    dataclasses.replace(_PLAIN, filters=80, channels=200, batch=37, image=(4, 4), run="arrays", dtype="float64"),
    dataclasses.replace(_PLAIN, filters=70, channels=130, batch=19, image=(13, 12), run="arrays"),
    dataclasses.replace(_PLAIN, filters=512, channels=70, image=(10, 11), operation="pointwise_depthwise"),
    dataclasses.replace(_PLAIN, filters=45, channels=600, image=(9, 7), run="graph"),
    *[dataclasses.replace(_PLAIN, channels=70, batch=9, image=(size, size), run="arrays") for size in (1, 2, 3)],
    dataclasses.replace(_PLAIN, channels=70, image=(9, 12), padding=((3, 0), (4, 3))),
    dataclasses.replace(_PLAIN, channels=50, image=(9, 25), strides=(2, 2), dilation_rate=(2, 2), run="graph"),
]

GRID = [
    *pairwise(VALUES, lambda case: case.is_possible),
    *pairwise(STOCK_VALUES, lambda c: c.is_possible and c.stock_can),
]
