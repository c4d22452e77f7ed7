"""The registry of problems: single layers taken from two networks, and the whole networks.

Letters as in `fastsepconv.kernels.geometry`: N batch, H W image, C channels, F filters, R S taps.
This file is pure Python, so that a peer's own interpreter can load it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

FORWARD, BACKWARD, PREDICT, TRAIN = "forward", "backward", "predict", "train"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# At batch 1 a layer alone would find its weights in the cores' L2, where a network never finds them: rotate among
# this many bytes of weights, within this many copies.
ROTATED_BYTES, MAX_WEIGHT_SETS = 64 << 20, 16


@dataclass(frozen=True)
class Layer:
    """One convolution, SAME: x `[N,size,size,C]` -> y `[N,output_size,output_size,F]`, all of `dtype`.

    `taps`, `strides` and `dilation`, the same along both axes, are the depthwise step's. `mode` "forward" returns y;
    "backward" runs forward and backward and returns y and every gradient. `uses` tells how often the layer occurs in
    its network. With `weight_sets` > 1, call i takes weight set i mod weight_sets.
    """

    suite: str
    size: int
    channels: int
    filters: int
    batch: int = 1
    mode: str = FORWARD
    op: str = "separable"
    taps: int = 3
    strides: int = 1
    dilation: int = 1
    bias: bool = False
    uses: int = 1
    weight_sets: int = 1
    dtype: str = FLOAT32

    @property
    def shape(self) -> str:
        """Such as 19x19x728-1024, or 74x74x256,5x5,stride2: what is not 3x3, stride 1 or dilation 1 stands behind."""
        channels = f"{self.channels}" if self.op == "depthwise" else f"{self.channels}-{self.filters}"
        parts = [f"{self.size}x{self.size}x{channels}"]
        parts += [f"{self.taps}x{self.taps}"] * (self.taps != 3)
        parts += [f"stride{self.strides}"] * (self.strides != 1)
        return ",".join(parts + [f"dilation{self.dilation}"] * (self.dilation != 1))

    @property
    def name(self) -> str:
        parts = [self.suite, self.shape, f"batch{self.batch}", self.mode]
        return "/".join(parts + ["rotated"] * (self.weight_sets > 1) + [self.dtype] * (self.dtype != FLOAT32))

    @property
    def output_size(self) -> int:
        return -(-self.size // self.strides)

    @property
    def padding(self) -> tuple[int, int]:
        """The zeros before and behind the image along each axis: an odd one stands behind, as in TensorFlow."""
        span = (self.taps - 1) * self.dilation + 1
        total = max(0, (self.output_size - 1) * self.strides + span - self.size)
        return total // 2, total - total // 2

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.op != "pointwise":
            shapes["depthwise"] = (self.taps, self.taps, self.channels, 1)
        if self.op != "depthwise":
            shapes["pointwise"] = (1, 1, self.channels, self.filters)
        if self.bias:
            shapes["bias"] = (self.filters,)
        return shapes

    @property
    def outputs(self) -> list[str]:
        """The names of what a step returns, in order."""
        return ["y"] if self.mode == FORWARD else ["y", "d_x", *(f"d_{name}" for name in self.weight_shapes)]

    @property
    def flops(self) -> int:
        """Multiplications and additions; each gradient (of the input and of the weights) costs a forward pass."""
        multiply_adds = sum(_product(shape) for name, shape in self.weight_shapes.items() if name != "bias")
        return (1 if self.mode == FORWARD else 3) * 2 * self.batch * self.output_size**2 * multiply_adds

    @property
    def weight_bytes(self) -> int:
        """Those of one set of weights."""
        return self._itemsize * sum(map(_product, self.weight_shapes.values()))

    @property
    def bytes_moved(self) -> int:
        """The bytes that a call must read and write at least: its tensors once, and nothing that lies between steps.

        Forward these are x, the weights and y. With "backward" x and the weights are read once more, dy is read once,
        as by a pass that computes all gradients together, and d_x and the weights' gradients are written.
        """
        x = self._itemsize * self.batch * self.size**2 * self.channels
        y = self._itemsize * self.batch * self.output_size**2 * self.filters
        return x + self.weight_bytes + y if self.mode == FORWARD else 3 * (x + self.weight_bytes) + 2 * y

    @property
    def _itemsize(self) -> int:
        return 4 if self.dtype == FLOAT32 else 2


@dataclass(frozen=True)
class Network:
    """A whole network: `mode` "predict" is a forward pass in inference mode, "train" a whole step with Adam."""

    suite: str
    batch: int
    mode: str
    op: str = "network"
    dtype: str = FLOAT32

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return {"xception": (299, 299, 3), "tutorial": (48, 48, 1)}[self.suite]

    @property
    def classes(self) -> int:
        return {"xception": 1000, "tutorial": 7}[self.suite]

    @property
    def name(self) -> str:
        return f"{self.suite}-network/batch{self.batch}/{self.mode}"


Problem = Layer | Network


def to_dict(problem: Problem) -> dict:
    """As JSON carries it to another process."""
    return asdict(problem)


def from_dict(fields: dict) -> Problem:
    return Network(**fields) if fields["op"] == "network" else Layer(**fields)


def _product(shape: Iterable[int]) -> int:
    result = 1
    for length in shape:
        result *= length
    return result


def separable_layers(size: int, exit_filters: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(size, C, F) of the 34 separable convolutions of an Xception, in order; `size` is that of the first one."""
    channels = 64
    for filters in (128, 256, 728):
        yield size, channels, filters
        yield size, filters, filters
        size, channels = -(-size // 2), filters
    for _ in range(8 * 3):
        yield size, 728, 728
    yield size, 728, 728
    yield size, 728, 1024
    size = -(-size // 2)
    yield size, 1024, exit_filters[0]
    yield size, *exit_filters


def _distinct(suite: str, size: int, exit_filters: tuple[int, int], bias: bool) -> list[Layer]:
    uses = Counter(separable_layers(size, exit_filters))
    return [Layer(suite, *shape, bias=bias, uses=count) for shape, count in uses.items()]


XCEPTION = _distinct("xception", 147, (1536, 2048), bias=False)  # keras.applications.Xception at 299x299
TUTORIAL = _distinct("tutorial", 24, (728, 1024), bias=True)  # the tutorial's network at 48x48x1


def _depthwise(shapes: Iterable[tuple[int, int]], taps: int = 3, strides: int = 1, dilation: int = 1) -> list[Layer]:
    """Layers of such sizes and channels."""
    return [
        Layer("depthwise", size, channels, channels, op="depthwise", taps=taps, strides=strides, dilation=dilation)
        for size, channels in shapes
    ]


SHAPES = {
    "xception": XCEPTION,
    "tutorial": TUTORIAL,
    "depthwise": [
        *_depthwise(((147, 128), (74, 256), (37, 728), (19, 728), (10, 1536))),
        *_depthwise(((74, 256), (19, 728)), taps=5),
        *_depthwise(((74, 256), (19, 728)), taps=7),
        *_depthwise(((147, 128), (37, 728)), strides=2),
        *_depthwise(((74, 256),), taps=5, strides=2),
        *_depthwise(((37, 728), (19, 728)), dilation=2),
    ],
    "pointwise": [Layer("pointwise", 19, 728, 728, op="pointwise")],
}
BATCHES = {"xception": (1, 8), "tutorial": (1, 8, 64), "depthwise": (1, 8), "pointwise": (1, 8)}
NETWORKS = {
    "xception": [Network("xception", 1, PREDICT), Network("xception", 8, PREDICT), Network("xception", 8, TRAIN)],
    "tutorial": [Network("tutorial", 1, PREDICT), Network("tutorial", 64, PREDICT), Network("tutorial", 64, TRAIN)],
}


def rotated(layer: Layer) -> Layer:
    """The same layer with its weights taken in turn from several sets."""
    return replace(layer, weight_sets=max(2, min(MAX_WEIGHT_SETS, -(-ROTATED_BYTES // layer.weight_bytes))))


def layers(
    suite: str, batches: Iterable[int] | None = None, modes: Iterable[str] | None = None, dtype: str = FLOAT32
) -> list[Layer]:
    """The layers of a suite, by pass, by batch (each suite's own batches by default), then in network order."""
    problems = []
    for mode in modes or (FORWARD, BACKWARD):
        for batch in batches or BATCHES[suite]:
            hot = [replace(layer, batch=batch, mode=mode, dtype=dtype) for layer in SHAPES[suite]]
            problems += hot
            if batch == 1:  # depthwise weights are small beside the image, wherever they come from
                problems += [rotated(layer) for layer in hot if layer.op != "depthwise"]
    return problems


def networks(name: str, batches: Iterable[int] | None = None, modes: Iterable[str] | None = None) -> list[Network]:
    """The runs of a whole network; "forward" stands for predict and "backward" for train."""
    wanted = {FORWARD: PREDICT, BACKWARD: TRAIN}
    kept_modes = {wanted.get(mode, mode) for mode in modes or (PREDICT, TRAIN)}
    if batches:
        return [Network(name, batch, mode) for mode in (PREDICT, TRAIN) if mode in kept_modes for batch in batches]
    return [problem for problem in NETWORKS[name] if problem.mode in kept_modes]
