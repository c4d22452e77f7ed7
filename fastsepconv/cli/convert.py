"""`fastsepconv convert`: a saved model, moved to this package's layers or back to Keras's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastsepconv.cli.console import CHECK_FAILED, OK, USAGE, CommandError, Console, add_command, load_keras

DESCRIPTION = """Write MODEL again with FastSeparableConv2D and FastDepthwiseConv2D in place of Keras's layers (or the
reverse), the same weights, names and optimizer. Loading OUT needs `import fastsepconv.layers`, unless --revert."""

EXAMPLES = (
    "fastsepconv convert xception.keras fast.keras",
    "fastsepconv convert run/model.keras stock.keras --revert    for a machine without fastsepconv",
)

EXITS = {CHECK_FAILED: "the model holds no layer to convert; nothing was written"}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    command = add_command(
        subparsers, "convert", "move a saved model to these layers, or back", DESCRIPTION, EXAMPLES, EXITS
    )
    command.add_argument("model", type=Path, metavar="MODEL", help=".keras file")
    command.add_argument("out", type=Path, metavar="OUT", help=".keras file to write")
    command.add_argument("--revert", action="store_true", help="back to Keras's own layers")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    console = Console(args.json)
    if args.out.suffix != ".keras" or not args.out.parent.is_dir():
        raise CommandError(
            f"Invalid value for argument `OUT`. Expected a .keras file in a folder that exists. Received: {args.out}",
            USAGE,
        )
    if args.out.exists() and not args.overwrite:
        raise CommandError(f"{args.out} exists. Expected --overwrite, or another name", USAGE)
    load_keras()
    import fastsepconv
    from fastsepconv.cli import checkpoint

    model = checkpoint.load(args.model)
    before = [type(layer) for layer in _layers(model)]
    try:
        (fastsepconv.revert if args.revert else fastsepconv.convert)(model, in_place=True)
    except ValueError as error:
        raise CommandError(f"{args.model}: {error}") from error
    changed = [layer.name for layer, former in zip(_layers(model), before, strict=True) if type(layer) is not former]
    if not changed:
        raise CommandError(f"{args.model}: holds no layer to {'revert' if args.revert else 'convert'}", CHECK_FAILED)
    checkpoint.save(model, args.out, checkpoint.training(args.model) or None)
    console.say(f"{args.out}: {len(changed)} layers {'reverted' if args.revert else 'converted'}")
    console.document({"model": str(args.model), "out": str(args.out), "layers": changed})
    return OK


def _layers(model: Any) -> list[Any]:
    return list(model._flatten_layers(recursive=True))
