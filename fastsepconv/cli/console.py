"""What the commands share: exit codes, the one-line error, what goes to stdout and what to stderr."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

OK, CHECK_FAILED, USAGE, BAD_FILE, NOT_INSTALLED, INTERRUPTED = 0, 1, 2, 3, 4, 130

EXIT_CODES = {
    OK: "done",
    CHECK_FAILED: "a check that the command makes has failed",
    USAGE: "the command line is wrong",
    BAD_FILE: "a file is missing or broken; the message names it",
    NOT_INSTALLED: "a Python package is missing; the message tells how to get it",
    INTERRUPTED: "interrupted (Ctrl-C)",
}


WIDTH_WITHOUT_TERMINAL = 100


class CommandError(Exception):
    """Ends a command with one line on stderr, and no traceback."""

    def __init__(self, message: str, code: int = BAD_FILE):
        super().__init__(message)
        self.code = code


def add_command(
    subparsers: Any, name: str, summary: str, description: str, examples: Sequence[str], exits: Mapping[int, str] = {}
) -> argparse.ArgumentParser:
    """Add a command with its examples, its exit codes and the options that every command has."""
    codes = {**EXIT_CODES, **exits}
    epilog = "examples:\n" + "".join(f"  {line}\n" for line in examples)
    epilog += "\nexit codes:\n" + "".join(f"  {code:<4} {meaning}\n" for code, meaning in codes.items())
    command = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    command.add_argument("--seed", type=count(0), default=0, help="seed of everything that is random (default: 0)")
    return command


def add_backend_option(command: argparse.ArgumentParser) -> None:
    """Add --backend, whose value `choose_backend` takes."""
    from fastsepconv import dispatch

    help = (
        f"whose kernels compute (default: what {dispatch.ENVIRONMENT} says, else auto); "
        "the README tells what of cuda has been run on a card"
    )
    command.add_argument("--backend", choices=dispatch.NAMES, help=help)


def choose_backend(name: str | None) -> None:
    """Let the backend of that name compute; CommandError where it cannot run here."""
    from fastsepconv import dispatch

    if name is not None:
        try:
            dispatch.set_backend(name)
        except ValueError as error:
            raise CommandError(str(error), USAGE) from error


def count(smallest: int) -> Callable[[str], int]:
    """An argparse type: an integer not below `smallest`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"Expected an integer of at least {smallest}. Received: {text}")
        return value

    return integer


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"Expected a number from 0 to below 1. Received: {text}")
    return value


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"Expected a number above 0. Received: {text}")
    return value


def require(**packages: str) -> None:
    """Check that modules can be imported, given as `module="name on PyPI"`."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        needs, extra = ", ".join(missing), "torch" if keras_backend() == "torch" else "tensorflow"
        raise CommandError(f"needs {needs}. Expected: pip install 'fastsepconv[{extra},demo]'", NOT_INSTALLED)


def keras_backend() -> str:
    """What KERAS_BACKEND asks for."""
    return os.environ.get("KERAS_BACKEND", "tensorflow")


def load_keras() -> None:
    """Import Keras and its backend without the lines that TensorFlow's libraries write to stderr while they load."""
    backend = keras_backend()
    if backend not in ("tensorflow", "torch"):
        expected = "Expected tensorflow or torch."
        raise CommandError(
            f"Invalid value for environment variable `KERAS_BACKEND`. {expected} Received: {backend}", USAGE
        )
    require(**{backend: backend}, keras="keras")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with stderr_kept_back():
        import keras  # noqa: F401

        if backend == "tensorflow":
            import tensorflow

            tensorflow.config.list_logical_devices()


@contextlib.contextmanager
def stderr_kept_back() -> Iterator[None]:
    """Keep back what C++ writes to file descriptor 2; show it after all when the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(saved, kept.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _plain(value: Any) -> Any:
    """`value` without what JSON has no word for: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Human words on stdout, or one JSON document there; progress always on stderr."""

    def __init__(self, json_only: bool):
        require(rich="rich")
        from rich.console import Console as RichConsole

        self.json_only = json_only
        self._out = RichConsole(quiet=json_only, highlight=False, markup=False, soft_wrap=True)
        self.err = RichConsole(stderr=True, highlight=False, markup=False)

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line as it is; `style` is rich's, as "bold green"."""
        self._out.print(text, style=style)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.say(f"\n{text}", "bold")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], footer: Sequence[Any] = ()) -> None:
        """Print a table: the first column to the left, the others to the right; nothing is cut off."""
        lines = [[str(cell) for cell in row] for row in (columns, *rows, *([footer] if footer else ()))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        styles = ["dim", *[""] * len(rows), "bold"]
        self.say()
        for (first, *others), style in zip(lines, styles, strict=False):
            aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            self.say("  ".join(["", first.ljust(widths[0]), *aligned]).rstrip(), style)
        self.say()

    def document(self, value: Mapping[str, Any]) -> None:
        """Print the JSON document, if it was asked for."""
        if self.json_only:
            print(json.dumps(_plain(value), indent=2, allow_nan=False))

    def progress(self) -> Any:
        """A context manager: rich progress bars on stderr that leave nothing behind."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        return Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self.err,
            transient=True,
        )
