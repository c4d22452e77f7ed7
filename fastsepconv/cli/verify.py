"""`fastsepconv verify`: what a saved model computes on this package's layers, beside Keras's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fastsepconv.cli.console import (
    CHECK_FAILED,
    OK,
    CommandError,
    Console,
    add_command,
    count,
    load_keras,
    positive,
)

DESCRIPTION = """Run a saved model twice on random images, on this package's layers and on Keras's own with the
same weights, and print the largest error of every layer, outputs and gradients. The model may be stock or
converted; the file stays as it is."""

EXAMPLES = (
    "fastsepconv verify run/model.keras",
    "fastsepconv verify xception.keras --batch 1 --size 299 299",
    "fastsepconv verify run/model.keras --training --json",
)

EXITS = {OK: "outputs and gradients agree within the limits", CHECK_FAILED: "they do not"}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    command = add_command(
        subparsers, "verify", "compare a saved model with Keras's own layers", DESCRIPTION, EXAMPLES, EXITS
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=".keras file")
    command.add_argument("--batch", type=count(1), default=2, metavar="N", help="images (default: 2)")
    command.add_argument(
        "--size",
        type=count(1),
        nargs=2,
        default=(96, 96),
        metavar=("H", "W"),
        help="of the images, where the model leaves it open (default: 96 96)",
    )
    command.add_argument("--training", action="store_true", help="as in training: batch statistics, dropout")
    command.add_argument(
        "--output-limit", type=positive, default=1e-4, metavar="X", help="largest difference (default: 1e-4)"
    )
    command.add_argument(
        "--gradient-limit", type=positive, default=1e-3, metavar="X", help="largest relative norm (default: 1e-3)"
    )


def run(args: argparse.Namespace) -> int:
    """Verify; returns the exit code."""
    console = Console(args.json)
    load_keras()
    from fastsepconv import verify
    from fastsepconv.cli import checkpoint

    model = checkpoint.load(args.model)
    inputs = [_random(tensor, args) for tensor in model.inputs]
    try:
        report = verify(model, inputs[0] if len(inputs) == 1 else inputs, training=args.training, seed=args.seed)
    except ValueError as error:
        raise CommandError(f"{args.model}: {error}") from error
    passed = report.max_output_error <= args.output_limit and report.max_gradient_error <= args.gradient_limit
    console.say(str(report))
    console.say(*("equal within the limits", "bold green") if passed else ("not equal within the limits", "bold red"))
    console.document({"passed": passed, **report.as_dict()})
    return OK if passed else CHECK_FAILED


def _random(tensor: Any, args: argparse.Namespace) -> np.ndarray:
    """Numbers from 0 to 1 in the shape of a symbolic input; open dimensions come from --size, in order."""
    sizes = iter(args.size)
    try:
        shape = [next(sizes) if size is None else size for size in tensor.shape[1:]]
    except StopIteration:
        raise CommandError(
            f"{args.model}: Expected inputs with two open dimensions at most. Received: {tensor.shape}"
        ) from None
    return np.random.default_rng(args.seed).random((args.batch, *shape)).astype(tensor.dtype)
