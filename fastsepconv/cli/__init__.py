"""The command line: one file a command, each with `add_parser(subparsers)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastsepconv.cli import console

COMMANDS = ("demo", "train", "predict", "bench", "verify", "convert", "doctor")

DESCRIPTION = "Separable convolution in Numba, as a Keras layer: train, predict, compare, and look inside."


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; building it imports neither TensorFlow nor Numba."""
    whole = argparse.ArgumentParser("fastsepconv", description=DESCRIPTION)
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"fastsepconv.cli.{name}").add_parser(subparsers)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `console.EXIT_CODES`)."""
    args = parser().parse_args(arguments)
    try:
        return importlib.import_module(f"fastsepconv.cli.{args.command}").run(args)
    except console.CommandError as error:
        print(f"fastsepconv {args.command}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"fastsepconv {args.command}: interrupted", file=sys.stderr)
        return console.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return console.OK
    except OSError as error:  # a folder that cannot be written to, a full disk
        print(f"fastsepconv {args.command}: {error}", file=sys.stderr)
        return console.BAD_FILE
