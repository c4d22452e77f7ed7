"""Progress of the two things that take time: compiling kernels and training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from fastsepconv.kernels.cpu import jit


class Compilation:
    """Which kernels were compiled (not loaded from the disk), and how long that took."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.seconds = 0.0
        self._depth = 0
        self._began = 0.0

    @contextlib.contextmanager
    def shown(self, bars: Any) -> Iterator[None]:
        """While the context lasts, show each kernel that is compiled in `bars`."""
        task = bars.add_task("compiling kernels", total=None, note="", visible=False)

        def listen(name: str, phase: str) -> None:
            if phase == "start":
                self._began = time.perf_counter() if self._depth == 0 else self._began
                self._depth += 1
                self.kernels.append(name)
                bars.update(task, visible=True, completed=len(self.kernels), note=".".join(name.split(".")[-2:]))
                return
            self._depth -= 1
            if self._depth == 0:
                self.seconds += time.perf_counter() - self._began
                bars.update(task, visible=False)

        with jit.on_compile(listen):
            yield


class TrainingBar(keras.callbacks.Callback):
    """A bar for the steps of the epoch, and a line that stays for each epoch that is over."""

    def __init__(self, bars: Any, state: Mapping[str, Any], epochs: int, steps: int):
        super().__init__()
        self.bars, self.state, self.epochs, self.steps = bars, state, epochs, steps
        self.task = bars.add_task("training", total=steps, note="", visible=False)
        self.task_begun = False

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        note = "" if self.task_begun else "building the graph"
        self.task_begun = True
        title = f"epoch {epoch + 1}/{self.epochs}"
        self.bars.reset(self.task, total=self.steps, description=title, note=note, visible=True)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        note = f"loss {float(logs['loss']):.3f}" if logs else ""
        self.bars.update(self.task, completed=batch + 1, note=note)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        last = {name: values[-1] for name, values in self.state["history"].items()}
        self.bars.update(self.task, visible=False)
        self.bars.console.print(
            f"  epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}   "
            f"training loss {last['loss']:.4f} {last['accuracy']:7.2%}   "
            f"validation loss {last['val_loss']:.4f} {last['val_accuracy']:7.2%}   {last['seconds']:.1f} s",
            soft_wrap=True,
        )
