"""What is raced on a card: Xception's layers at 299x299, as products, depthwise and separable ones, and the network.

Letters as in `problems`; numbers are "float32" (no shortcuts), "tf32" (float32 whose products may be TF32) or
"bfloat16", the same for every provider.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .problems import PREDICT, TRAIN, XCEPTION

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
NUMBERS = ("float32", "tf32", "bfloat16")
ITEM_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
TAPS = 3
XCEPTION_FLOPS = 16_700_000_000  # of the whole network, an image of 299x299, forward
QUICK_SIZES = {("pointwise", 19), ("pointwise", 74), ("depthwise", 19), ("depthwise", 37)}
MIDDLE = 19, 728, 728  # the shape that Xception has most of; it stands for its group where time is short


@dataclass(frozen=True)
class CudaProblem:
    """One operation, SAME, stride 1: x `[N,size,size,C]`; "backward" computes the gradients of x and of the kernels."""

    op: str
    size: int
    channels: int
    filters: int
    batch: int
    mode: str
    numbers: str

    @property
    def group(self) -> str:
        """What its ratio goes into the mean of."""
        return f"{self.op} {self.mode}, {self.numbers}, batch {self.batch}"

    @property
    def shape(self) -> str:
        shape = f"{self.size}x{self.size}x{self.channels}"
        return shape if self.op == "depthwise" else f"{shape}-{self.filters}"

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} batch{self.batch} {self.mode} {self.numbers}"

    @property
    def pixels(self) -> int:
        return self.batch * self.size**2

    @property
    def flops(self) -> int:
        """Multiplications and additions; a backward pass costs two forward passes."""
        taps = TAPS * TAPS * self.channels if self.op != "pointwise" else 0
        products = self.channels * self.filters if self.op != "depthwise" else 0
        return {FORWARD: 1, BACKWARD: 2, BOTH: 3}[self.mode] * 2 * self.pixels * (taps + products)

    @property
    def least_bytes(self) -> int:
        """What has to cross the card's memory: each pass reads and writes its arrays of images once."""
        inside, outside = self.pixels * self.channels, self.pixels * self.filters
        forward, backward = inside + outside, 2 * inside + outside
        numbers = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[self.mode]
        return ITEM_BYTES[self.numbers] * numbers


@dataclass(frozen=True)
class CudaNetwork:
    """keras.applications.Xception whole, on images `[N,size,size,3]`, to predict with or to take a step of training."""

    mode: str
    numbers: str
    batch: int = 32
    size: int = 299
    op: str = "network"

    @property
    def group(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return f"xception {self.size} {self.mode}, {self.numbers}, batch {self.batch}"

    @property
    def flops(self) -> int:
        """Those of the convolutions and the dense layer; training costs three forward passes."""
        return round(XCEPTION_FLOPS * (self.size / 299) ** 2) * self.batch * (1 if self.mode == PREDICT else 3)

    least_bytes = 0  # it is not known what the other layers may leave out


def problems(quick: bool = False) -> list[CudaProblem | CudaNetwork]:
    """Everything that is raced: of each group one first, so that none is missing when the time is over, then the rest.

    `quick` leaves out most single operations, and all but one of batch 128.
    """
    halves = "float32", "bfloat16"
    layers = [
        *_layers("pointwise", FORWARD, 32, NUMBERS),
        *_layers("depthwise", FORWARD, 32, halves),
        *_layers("depthwise", BACKWARD, 32, halves),
        *_layers("separable", FORWARD, 32, NUMBERS),
        *_layers("separable", BOTH, 32, NUMBERS),
        *_layers("pointwise", FORWARD, 128, NUMBERS),
    ]
    first = [layer for layer in layers if (layer.size, layer.channels, layer.filters) == MIDDLE]
    networks = [CudaNetwork(mode, numbers) for mode in (PREDICT, TRAIN) for numbers in halves]
    rest = [layer for layer in layers if layer not in first and not (quick and _is_left_out(layer))]
    rest.sort(key=lambda layer: layer.op != "separable")  # those tell most
    return [*first, *networks, *rest]


def _layers(op: str, mode: str, batch: int, numbers: Iterable[str]) -> list[CudaProblem]:
    shapes = dict.fromkeys(
        (layer.size, layer.channels, layer.channels if op == "depthwise" else layer.filters) for layer in XCEPTION
    )
    return [CudaProblem(op, *shape, batch, mode, each) for each in numbers for shape in shapes]


def _is_left_out(layer: CudaProblem) -> bool:
    """Whether a quick race goes without it."""
    return layer.batch > 32 or not (layer.op == "separable" or (layer.op, layer.size) in QUICK_SIZES)
