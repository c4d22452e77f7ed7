"""Ctrl-C between two steps of a training, and not in the middle of TensorFlow's work.

Python raises KeyboardInterrupt wherever it stands: in a constructor that TensorFlow's C++ called, in a data pipeline,
in a `__del__` that swallows it. What comes out is now another exception, now a broken graph, now a crash.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any, Self

import keras


class InterruptsBetweenSteps(keras.callbacks.Callback):
    """While the context lasts, Ctrl-C raises KeyboardInterrupt at the next step; a second Ctrl-C raises it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self._replaces: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other is told of signals
            self._replaces = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._replaces is not None:
            signal.signal(signal.SIGINT, self._replaces)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        if self.requested:
            raise KeyboardInterrupt

    on_test_batch_begin = on_predict_batch_begin = on_train_batch_begin
