"""Times on a card: events around replays of CUDA graphs, where no host work counts; inputs rotate past the L2 cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

MOST_SETS = 8
COPY_BYTES = 2**30
MATRIX = 8192


def set_count(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs a graph goes through, so that none is in the cache when its turn comes again."""
    return max(2, min(MOST_SETS, math.ceil(2 * cache_bytes / max(1, set_bytes)) + 1))


def cache_bytes() -> int:
    """The size of the card's L2 cache; a generous guess where PyTorch does not tell."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)


class Replay:
    """A graph that runs a step once on each set."""

    def __init__(self, step: Callable[[Any], Any], sets: Sequence[Any]) -> None:
        self.calls = len(sets)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for each in sets:  # what a library does at its first call does not go into the graph
                step(each)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = [step(each) for each in sets]  # kept, so that each has memory of its own
        self.graph.replay()
        torch.cuda.synchronize()

    def seconds(self, replays: int) -> list[float]:
        """The seconds of one step, measured that many times."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        self.graph.replay()  # the card is busy and awake when the first event comes
        marks[0].record()
        for mark in marks[1:]:
            self.graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 / self.calls for begin, end in pairwise(marks)]


class Calls:
    """A step that the host calls each time, as a user does, timed like a graph's replays."""

    calls = 1

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.host: list[float] = []  # seconds that the host took for each call to return
        for _ in range(2):  # what is chosen or compiled at the first call is not timed
            step()
        torch.cuda.synchronize()

    def seconds(self, replays: int) -> list[float]:
        """The seconds of one call, measured that many times."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        self.step()
        marks[0].record()
        for mark in marks[1:]:
            began = time.perf_counter()
            self.step()
            self.host.append(time.perf_counter() - began)
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]


def race(replays: Mapping[str, Replay | Calls], rounds: int, seconds: float) -> dict[str, list[list[float]]]:
    """Blocks of times by name, taken in turns: as many replays a block as make up its share of `seconds`."""
    times: dict[str, list[list[float]]] = {name: [] for name in replays}
    share = seconds / (rounds * len(replays))
    counts = {
        name: max(3, min(200, int(share / (replay.calls * min(replay.seconds(2))))))
        for name, replay in replays.items()
    }  # fmt: skip
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(replay.seconds(counts[name]))
    return times


def ceilings() -> dict[str, float]:
    """What the card reaches here and now: bytes a second of a copy, both ways counted, and operations a second."""
    found = {}
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = 2 * COPY_BYTES / min(Replay(lambda pair: pair[0].copy_(pair[1]), [(target, source)]).seconds(5))
    del source, target
    for numbers, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = numbers == "tf32"
        pair = [torch.randn(MATRIX, MATRIX, device="cuda").to(dtype) for _ in range(2)]
        found[numbers] = 2 * MATRIX**3 / min(Replay(lambda pair: torch.matmul(*pair), [pair]).seconds(3))
    torch.backends.cuda.matmul.allow_tf32 = False
    return found
