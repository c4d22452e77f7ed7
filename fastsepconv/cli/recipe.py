"""Everything that decides the numbers of a training run. A checkpoint carries it, so that a run can be resumed."""

from __future__ import annotations

from dataclasses import dataclass

LAST, BEST = "model.keras", "best.keras"  # the checkpoints of a run: after the last epoch, and after the best
TENSORBOARD = "tensorboard"  # the folder of its log

LAYERS = ("fast", "keras")
SCHEDULES = ("constant", "cosine")
ORDERS = ("depthwise_pointwise", "pointwise_depthwise")
DTYPES = ("float32", "float64", "mixed_float16", "mixed_bfloat16")


@dataclass(frozen=True)
class Recipe:
    """The defaults are the tutorial's: Adam at its usual rate, 150 epochs, batches of 64, eight middle blocks."""

    epochs: int = 150
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: str = "constant"  # "cosine" warms up over a tenth of the steps and then falls to zero
    shift: int = 0  # images are moved by up to that many pixels, along both axes
    flip: bool = False  # every second image is mirrored
    num_blocks: int = 8
    momentum: float = 0.99  # of batch normalisation's moving averages
    order: str = "depthwise_pointwise"
    layer: str = "fast"  # "fast" is FastSeparableConv2D, "keras" is the stock layer
    dtype: str = "float32"  # a Keras dtype policy
    seed: int = 0
