"""The cases of the grid: every argument's values, a pairwise covering of them, and cases of certain sizes.

No framework is imported here: the processes that run the fallback tiles have none.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator

import ml_dtypes  # noqa: F401 (so that NumPy knows bfloat16)
import numpy as np

from fastsepconv.kernels import reference
from fastsepconv.kernels.geometry import Geometry, Padding, Pair, effective_size, resolve
from tests.tolerances import ROUNDING_UNIT

Items = tuple[tuple[str, object], ...]

VALUES: dict[str, tuple] = {
    "operation": ("depthwise_pointwise", "pointwise_depthwise", "depthwise", "pointwise"),
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
    "dtype": ("float32", "float64", "float16", "bfloat16"),
    "run": ("eager", "graph", "arrays", "arrays into"),  # the last writes to the caller's array
    "threads": (1, 2),
}

# The arguments that an operation does not have: None in its cases.
UNUSED: dict[str, tuple[str, ...]] = {
    "depthwise": ("filters",),
    "pointwise": ("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier"),
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


HALVES = ("float16", "bfloat16")
JUMP_UNITS = 4  # so near to a jump, in rounding units, a sum may fall on its other side


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: the arguments, the sizes, and how it is run. What the operation does not have is None."""

    operation: str
    kernel_size: Pair | None
    strides: Pair | None
    padding: Padding | None
    dilation_rate: Pair | None
    data_format: str
    depth_multiplier: int | None
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
    def steps(self) -> list[str]:
        """ "depthwise" and "pointwise" in their order, or one of them."""
        return self.operation.split("_")

    @property
    def is_possible(self) -> bool:
        """Whether the kernel fits the padded image."""
        return self.operation == "pointwise" or min(self.geometry.out_height, self.geometry.out_width) > 0

    @property
    def layer_can(self) -> bool:
        """Whether a layer of ours is constructed with the arguments; TensorFlow tensors and NumPy arrays take all."""
        if self.operation == "pointwise":
            return False
        return isinstance(self.padding, str) and (max(self.strides) == 1 or max(self.dilation_rate) == 1)

    @property
    def stock_can(self) -> bool:
        """Whether TensorFlow's CPU kernels can run the stock layer, backward too (on images transposed to NHWC)."""
        if self.operation == "pointwise":
            return self.batch > 0
        return self.layer_can and self.strides[0] == self.strides[1] and self.batch > 0 and not self._stock_errs

    @property
    def _stock_errs(self) -> bool:
        """Whether they compute numbers that have nothing to do with it: those of bfloat16 do, with strides and a depth
        multiplier, where the output is one pixel wide (oneDNN of TensorFlow 2.21, on a CPU with AMX)."""
        wide = self.dtype != "bfloat16" or self.geometry.out_width > 1
        return not wide and max(self.strides) > 1 and self.depth_multiplier > 1

    @property
    def by_arrays(self) -> bool:
        """Whether the array API runs it, which is given the gradient before the activation."""
        return self.run.startswith("arrays")

    @property
    def geometry(self) -> Geometry:
        """Of the depthwise step. Assumes: there is one."""
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
        """The arguments of a layer or a function that say which pixels it reads."""
        names = ("strides", "padding", "dilation_rate", "data_format")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def function(self) -> str:
        """The name of the function that convolves, in the array API and in the bridge."""
        return f"{self.operation if len(self.steps) == 1 else 'separable'}_conv2d"

    @property
    def options(self) -> dict:
        """That function's arguments, but for arrays and the activation."""
        return self.window | ({"order": self.operation} if len(self.steps) == 2 else {})

    @property
    def roundings(self) -> int:
        """How many rounding units of a half type a result may be off, of its largest value.

        The array API rounds once, at the end, as does the one op of a convolution in TensorFlow. Where there are two
        ops, the middle is rounded too, and of bfloat16 it may be in either; so are an activation and the terms of its
        slope: one of 1 - y*y that is at least a quarter (see `exact`) is off by four units then.
        """
        if self.dtype not in HALVES:
            return 1
        if self.by_arrays:
            return 2 if self.operation == "pointwise_depthwise" and self.dtype == "bfloat16" else 1
        if self.activation in ("tanh", "sigmoid"):
            return 5
        return 2 if self.operation == "pointwise_depthwise" else 1

    def arrays(self, draw: int = 0) -> dict[str, np.ndarray]:
        """x `[N,H,W,C]`, the kernels in the order of the steps, the bias; their scale is such that outputs are about 1.

        The numbers are seeded by the case; `draw` tells one set of them from another.
        """
        random = np.random.default_rng((zlib.crc32(repr(self).encode()), draw))
        channels = self.channels
        shapes, terms = {"x": (self.batch, *self.image, channels)}, {}
        for step in self.steps:
            if step == "depthwise":
                shape, summed = self.geometry.kernel_shape, self.geometry.kernel_height * self.geometry.kernel_width
                channels *= self.depth_multiplier
            else:
                shape, summed = (1, 1, channels, self.filters), channels
                channels = self.filters
            shapes[f"{step}_kernel"], terms[f"{step}_kernel"] = shape, summed
        if self.use_bias:
            shapes["bias"] = (channels,)
        return {
            name: (random.standard_normal(shape) / terms.get(name, 1) ** 0.5).astype(self.dtype)
            for name, shape in shapes.items()
        }


def exact(case: Case, arrays: dict[str, np.ndarray]) -> tuple[dict, np.ndarray, np.ndarray]:
    """By the reference: {"y": output, "x": its gradient, ...}, dy, and the gradient before the activation.

    dy is zero where the activation's slope jumps: which side of the jump a sum falls on is a matter of rounding. So is
    a small slope of an activation that TensorFlow computes in a half type.
    """
    inputs = [arrays["x"]]
    for step in case.steps:
        inputs.append(_forward(case, step, inputs[-1], arrays[f"{step}_kernel"]))
    before = inputs.pop()
    if case.use_bias:
        before = before + arrays["bias"].astype(np.float64)
    function, slope, jumps = ACTIVATIONS[case.activation]
    random = np.random.default_rng(1)
    dy = random.standard_normal(before.shape).astype(case.dtype)
    for jump in jumps:
        dy[np.abs(before - jump) < max(1e-4, JUMP_UNITS * ROUNDING_UNIT[case.dtype] * max(1, jump))] = 0
    if case.dtype in HALVES:
        dy[slope(before) < slope(np.float64(0)) / 4] = 0
    d_before = dy.astype(np.float64) * slope(before)
    if case.by_arrays:
        d_before = d_before.astype(case.dtype)
    results, d_inputs = {"y": function(before)}, d_before
    for step, x in zip(reversed(case.steps), reversed(inputs), strict=True):
        name = f"{step}_kernel"
        d_inputs, results[name] = _backward(case, step, x, arrays[name], d_inputs)
    bias = {"bias": d_before.astype(np.float64).sum((0, 1, 2))} if case.use_bias else {}
    return results | {"x": d_inputs} | bias, dy, d_before


def _forward(case: Case, step: str, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    if step == "depthwise":
        return reference.depthwise_forward(case.geometry, x, kernel)
    return reference.pointwise_forward(x, kernel[0, 0])


def _backward(case: Case, step: str, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray) -> tuple:
    """The gradients of x and of the kernel."""
    if step == "depthwise":
        return reference.depthwise_backward(case.geometry, x, kernel, dy)[:2]
    d_x, d_kernel, _ = reference.pointwise_backward(x, kernel[0, 0], dy)
    return d_x, d_kernel[None, None]


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
            not_an_argument = first == "operation" and second in UNUSED.get(a, ())
            # Keras's constructor refuses these together
            strides_with_dilation = values is STOCK_VALUES and (first, second) == ("strides", "dilation_rate")
            if not not_an_argument and not (strides_with_dilation and max(a) > 1 and max(b) > 1):
                yield (first, a), (second, b)


def pairs_of(case: Case) -> set[Items]:
    """Every two arguments' values that this case has."""
    return set(itertools.combinations(((name, getattr(case, name)) for name in VALUES), 2))


def _drawn(values: dict[str, tuple], items: Items, random: np.random.Generator) -> Case:
    """A case with these arguments' values, the others drawn."""
    arguments = dict(items)
    operations = [name for name in values["operation"] if not arguments.keys() & set(UNUSED.get(name, ()))]
    drawn = {name: options[random.integers(len(options))] for name, options in values.items()}
    drawn |= {"operation": operations[random.integers(len(operations))]} | arguments
    drawn |= dict.fromkeys(UNUSED.get(drawn["operation"], ()))
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
# parts, several images to a part, more parts than one, bands of lines; lines that are all border, and borders wider
# than a tap; a few rows, for which the kernel is read in several slabs; taps in wide rows.
SIZES = [
    *[dataclasses.replace(_PLAIN, image=(1, width), channels=9, run="arrays") for width in range(15, 29)],
    dataclasses.replace(_PLAIN, filters=256, channels=24, image=(160, 161)),
    dataclasses.replace(_PLAIN, filters=24, channels=256, image=(160, 161), run="graph"),
    dataclasses.replace(_PLAIN, filters=None, operation="depthwise", channels=256, image=(160, 161), run="graph"),
    dataclasses.replace(_PLAIN, filters=48, channels=256, batch=5, image=(52, 52), use_bias=False),
    dataclasses.replace(_PLAIN, filters=33, channels=40, batch=2, image=(190, 171), strides=(2, 2), run="arrays"),
    dataclasses.replace(_PLAIN, filters=21, channels=67, batch=9, image=(39, 44), dilation_rate=(2, 2), run="graph"),
    dataclasses.replace(_PLAIN, filters=300, channels=350, batch=9, image=(17, 15), run="graph"),
    dataclasses.replace(_PLAIN, channels=272, filters=33, image=(21, 23), threads=1, run="graph"),
    dataclasses.replace(_PLAIN, filters=112, image=(29, 31), dtype="float64", operation="pointwise_depthwise"),
    dataclasses.replace(_PLAIN, filters=None, operation="depthwise", batch=37, channels=40, image=(6, 7)),
    dataclasses.replace(_PLAIN, filters=80, channels=200, batch=37, image=(4, 4), run="arrays", dtype="float64"),
    dataclasses.replace(_PLAIN, filters=70, channels=130, batch=19, image=(13, 12), run="arrays"),
    dataclasses.replace(_PLAIN, filters=512, channels=70, image=(10, 11), operation="pointwise_depthwise"),
    dataclasses.replace(_PLAIN, filters=45, channels=600, image=(9, 7), run="graph"),
    dataclasses.replace(_PLAIN, filters=67, channels=300, batch=2, image=(4, 3), run="graph"),
    dataclasses.replace(_PLAIN, filters=512, channels=512, batch=2, image=(20, 20), run="arrays"),
    *[dataclasses.replace(_PLAIN, channels=70, batch=9, image=(size, size), run="arrays") for size in (1, 2, 3)],
    dataclasses.replace(_PLAIN, filters=500, channels=160, batch=2, image=(5, 700), run="arrays"),
    dataclasses.replace(_PLAIN, filters=1600, channels=1500, batch=3, image=(4, 100), run="arrays"),
    dataclasses.replace(_PLAIN, filters=40, channels=1100, image=(5, 4), run="arrays"),
    dataclasses.replace(_PLAIN, filters=70, channels=1100, image=(8, 9), run="graph"),
    dataclasses.replace(_PLAIN, filters=1100, channels=40, image=(21, 20), threads=1, run="arrays"),
    dataclasses.replace(
        _PLAIN, operation="pointwise_depthwise", channels=64, filters=40, image=(7, 9), dtype="bfloat16", run="arrays"
    ),
    dataclasses.replace(_PLAIN, channels=70, image=(9, 12), padding=((3, 0), (4, 3))),
    dataclasses.replace(_PLAIN, channels=50, image=(9, 25), strides=(2, 2), dilation_rate=(2, 2), run="graph"),
    *[
        dataclasses.replace(_PLAIN, filters=20, channels=70, kernel_size=(rows, taps), image=(9, width), run="arrays")
        for rows, taps in ((5, 5), (3, 7))
        for width in (1, 2, 9, 11, 14)
    ],
    dataclasses.replace(_PLAIN, channels=70, kernel_size=(2, 7), image=(9, 17), dtype="bfloat16", run="arrays"),
    dataclasses.replace(_PLAIN, filters=20, channels=70, kernel_size=(7, 7), image=(21, 25), dilation_rate=(3, 3)),
    dataclasses.replace(_PLAIN, channels=50, kernel_size=(7, 5), image=(8, 12), padding=((3, 5), (6, 5)), run="arrays"),
]

GRID = [
    *pairwise(VALUES, lambda case: case.is_possible),
    *pairwise(STOCK_VALUES, lambda c: c.is_possible and c.stock_can),
]
