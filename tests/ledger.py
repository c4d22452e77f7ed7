"""What tests on a card write down as they run, a line an event: `make test-cuda` says where, and tells it in tables."""

from __future__ import annotations

import json
import os

from fastsepconv.kernels import nvidia

VARIABLE = "FASTSEPCONV_CUDA_LEDGER"


def write(event: str, **what: str) -> None:
    """A line of the ledger, if one is kept: what has "begun", "passed", "failed" or was "skipped", and on what card."""
    if VARIABLE in os.environ:
        with open(os.environ[VARIABLE], "a") as file:
            file.write(json.dumps({**what, "event": event, "card": card()}) + "\n")


def card() -> str:
    _, cards = nvidia.look()
    return cards[0].name if cards else "none"
