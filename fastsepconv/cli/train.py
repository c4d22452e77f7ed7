"""`fastsepconv train`: the tutorial's Xception on the tutorial's files or on FER-2013's CSV."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsepconv.cli import data
from fastsepconv.cli.console import (
    BAD_FILE,
    CHECK_FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    CommandError,
    Console,
    add_backend_option,
    add_command,
    choose_backend,
    count,
    fraction,
    keras_backend,
    load_keras,
    positive,
    require,
)
from fastsepconv.cli.recipe import BEST, DTYPES, LAST, LAYERS, ORDERS, SCHEDULES, TENSORBOARD, Recipe

if TYPE_CHECKING:
    from fastsepconv.cli.training import Outcome

DESCRIPTION = """Train the tutorial's Xception (48x48 images, seven classes, or whatever the data say).

--out receives, after every epoch, model.keras (all that --resume needs) and best.keras (the
best epoch so far), as it goes tensorboard/ (a log for TensorBoard), and at the end:
learning_curve.png, confusion_matrix.png, model.png (the network), operations.json and history.json."""

IMAGES = f"images of uint8, or of floats {data.FLOATS}"

EXAMPLES = (
    "fastsepconv train --data faces/ --out run          X_train.npy, X_test.npy, y_train.npy, y_test.npy",
    "fastsepconv train --csv fer2013.csv --out run      emotion,pixels,Usage",
    "fastsepconv train --data faces/ --epochs 20 --schedule cosine --shift 4 --flip",
    "fastsepconv train --resume --out run               go on after Ctrl-C, with nothing lost",
    "fastsepconv train --resume --out run --epochs 200  go on for longer",
    "tensorboard --logdir run/tensorboard",
)

EXITS = {
    CHECK_FAILED: "the loss is no longer a number",
    BAD_FILE: "a data file or checkpoint is missing or broken; the message names it",
    INTERRUPTED: "interrupted (Ctrl-C); the last checkpoint is whole",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    command = add_command(subparsers, "train", "train an Xception on images", DESCRIPTION, EXAMPLES, EXITS)
    source = command.add_argument_group("images").add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="DIR", help=f"the tutorial's four .npy files: {IMAGES}")
    source.add_argument("--csv", type=Path, metavar="FILE", help="FER-2013's CSV")
    command.add_argument(
        "--out", type=Path, default=Path("run"), metavar="DIR", help="where it all goes (default: run)"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from OUT/model.keras with what it was started with"
    )
    command.add_argument("--overwrite", action="store_true", help="begin anew where OUT holds a checkpoint")
    command.add_argument("--labels", metavar="A,B,..", help="names of the classes, in the labels' order")
    command.add_argument(
        "--validation",
        type=fraction,
        metavar="PART",
        help="validate on this part of the training images (default: on X_test, as the tutorial, or PublicTest)",
    )
    command.set_defaults(seed=None)  # so that --resume can tell what was given from what was not
    add_backend_option(command)
    add_recipe_arguments(command, Recipe())


def add_recipe_arguments(command: argparse.ArgumentParser, default: Recipe, leave_out: Collection[str] = ()) -> None:
    """Add an option for each field of `Recipe`. Those that are not given are left out of the parsed arguments."""
    group = command.add_argument_group("recipe", argument_default=argparse.SUPPRESS)

    def option(flag: str, help: str, **kwargs: Any) -> None:
        if flag not in leave_out:
            value = getattr(default, flag[2:].replace("-", "_"))
            group.add_argument(flag, help=f"{help} (default: {value})", **kwargs)

    option("--epochs", "passes over the training images", type=count(1))
    option("--batch-size", "images a step", type=count(1))
    option("--learning-rate", "Adam's, or its peak", type=positive)
    option("--schedule", "course of the learning rate; cosine warms up first", choices=SCHEDULES)
    option("--shift", "move training images by up to that many pixels", type=count(0))
    option("--flip", "mirror half of the training images", action="store_true")
    option("--num-blocks", "blocks of the middle flow", type=count(0))
    option("--momentum", "of batch normalisation; short runs want 0.9 or less", type=fraction)
    option("--order", "which of the two steps comes first", choices=ORDERS)
    option("--layer", "FastSeparableConv2D, or Keras's SeparableConv2D", choices=LAYERS)
    option("--dtype", "a Keras dtype policy", choices=DTYPES)


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say; returns the exit code."""
    console = Console(args.json)
    choose_backend(args.backend)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    del given["seed"]
    if args.resume:
        given |= {} if args.seed is None else {"seed": args.seed}
        recipe, source, dataset = _resumed(args, given)
    else:
        if (args.out / LAST).exists() and not args.overwrite:
            raise CommandError(f"{args.out / LAST} exists. Expected --resume to go on with it, or --overwrite", USAGE)
        recipe, source = Recipe(**given, seed=args.seed or 0), _source(args)
        if recipe.layer == "keras" and recipe.order != ORDERS[0]:
            expected = f"Expected {ORDERS[0]}, the one order of --layer keras. Received: {recipe.order}"
            raise CommandError(f"Invalid value for argument `--order`. {expected}", USAGE)
        dataset = data.load(source)
    outcome = execute(recipe, source, dataset, args.out, console, resume=args.resume)
    show_operations(outcome, console)
    console.document(summary(outcome, dataset, args.out))
    return OK


def execute(
    recipe: Recipe, source: data.Source, dataset: data.Dataset, out: Path, console: Console, *, resume: bool = False
) -> Outcome:
    """Train, then leave every picture and table of the run in `out`. `fastsepconv demo` runs this too.

    Without `resume` the checkpoints of an earlier run in `out` are removed.
    """
    require(matplotlib="matplotlib")
    load_keras()
    from fastsepconv.cli import training

    missing = [name for name in ("tensorboard", "tensorflow") if find_spec(name) is None]
    if missing:
        console.say(f"  no TensorBoard log: Keras writes it with TensorFlow. Missing: {', '.join(missing)}")
    elif keras_backend() != "tensorflow":
        _keep_tensorflow_off_cards()
    if not resume:
        _remove_checkpoints(out)
    outcome = training.train(recipe, source, dataset, out, console, resume=resume, tensorboard=not missing)
    try:
        _leave(outcome, dataset, out, console)
    except KeyboardInterrupt:
        kept = f"{out / LAST} is whole, and `fastsepconv train --resume --out {out}` draws the pictures"
        raise CommandError(f"interrupted after the last epoch; {kept}", INTERRUPTED) from None
    return outcome


def _keep_tensorflow_off_cards() -> None:
    """TensorFlow, which only writes the log, would take all memory of a card that another backend computes on."""
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")


def _source(args: argparse.Namespace) -> data.Source:
    if not args.data and not args.csv:
        raise CommandError("Expected images: --data DIR or --csv FILE (or --resume)", USAGE)
    path = args.data or args.csv
    kind, labels = "folder" if args.data else "csv", tuple(args.labels.split(",")) if args.labels else None
    return data.Source(kind, str(path.resolve()), labels, args.validation or 0.0, args.seed or 0)


def _remove_checkpoints(out: Path) -> None:
    """Of a run that is begun anew: else a Ctrl-C in the first epoch would leave the old one to be resumed."""
    for name in (LAST, BEST):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)


def _resumed(args: argparse.Namespace, given: dict[str, Any]) -> tuple[Recipe, data.Source, data.Dataset]:
    """The recipe and images that the checkpoint was trained with; only the number of epochs may change."""
    load_keras()
    from fastsepconv.cli import checkpoint

    path = args.out / LAST
    state = checkpoint.training(path)
    if not state:
        raise CommandError(f"{path}: Expected a checkpoint of `fastsepconv train`. Received: a file of another program")
    recipe, source = Recipe(**state["recipe"]), data.Source(**state["source"])
    started_with = [(name, getattr(recipe, name), value) for name, value in given.items() if name != "epochs"]
    if args.labels:
        started_with.append(("labels", ",".join(source.labels or ()) or "the names of the data", args.labels))
    if args.validation is not None:
        started_with.append(("validation", source.validation, args.validation))
    for name, expected, value in started_with:
        if value != expected:
            raise CommandError(
                f"Invalid value for argument `--{name.replace('_', '-')}`. Expected {expected}, which the resumed run "
                f"was started with. Received: {value}",
                USAGE,
            )
    if args.data or args.csv:
        source = _source(args)._replace(labels=source.labels, validation=source.validation, seed=source.seed)
    dataset = data.load(source)
    if dataset.fingerprint() != state["fingerprint"]:
        raise CommandError(f"{source.path}: Expected the images that {path} was trained on. Received: others")
    return replace(recipe, epochs=given.get("epochs", recipe.epochs)), source, dataset


def _leave(outcome: Outcome, dataset: data.Dataset, out: Path, console: Console) -> None:
    from fastsepconv.cli import operations, pictures

    costs = operations.count(outcome.model)
    (out / "operations.json").write_text(json.dumps([cost._asdict() for cost in costs], indent=2))
    (out / "history.json").write_text(json.dumps(outcome.state["history"], indent=2))
    pictures.learning_curve(outcome.state["history"], out / "learning_curve.png")
    matrix = np.zeros((len(dataset.labels),) * 2, np.int64)
    np.add.at(matrix, (dataset.test.y, outcome.probabilities.argmax(axis=1)), 1)
    pictures.confusion_matrix(matrix, dataset.labels, out / "confusion_matrix.png")
    problem = pictures.network(outcome.model, out / "model.png")
    if problem:
        console.say(f"  {problem}")
    console.say(
        f"  held-out accuracy {outcome.accuracy:.2%} on {len(dataset.test.y)} images; "
        f"{outcome.state['epoch']} epochs, {outcome.seconds:.0f} s; all in {out}/"
    )


def show_operations(outcome: Outcome, console: Console) -> None:
    """Print the tutorial's count of operations, for one image."""
    from fastsepconv.cli import operations

    console.heading("Multiplications for one image: standard convolutions, and the separable ones that stand for them")
    operations.show(operations.count(outcome.model), console)


def summary(outcome: Outcome, dataset: data.Dataset, out: Path) -> dict[str, Any]:
    """The run as one JSON document."""
    from fastsepconv.cli import operations

    costs = operations.count(outcome.model)
    standard, separable = operations.totals(costs)
    return {
        "recipe": outcome.state["recipe"],
        "source": outcome.state["source"],
        "labels": list(dataset.labels),
        "images": {"train": len(dataset.train.y), "validation": len(dataset.validation.y), "test": len(dataset.test.y)},
        "held_out_accuracy": outcome.accuracy,
        "history": outcome.state["history"],
        "seconds": outcome.seconds,
        "compilation": {"kernels": len(outcome.compilation.kernels), "seconds": outcome.compilation.seconds},
        "operations": {
            "standard": standard,
            "separable": separable,
            "layers": [cost._asdict() for cost in costs],
        },
        "files": sorted(str(path) for path in out.iterdir()),
    }
