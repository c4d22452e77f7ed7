"""`fastsepconv demo`: real images, one Xception on our layer and one on Keras's, and how far they agree."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsepconv import dispatch
from fastsepconv.cli import data
from fastsepconv.cli.ahead import compiled_meanwhile
from fastsepconv.cli.console import (
    CHECK_FAILED,
    OK,
    Console,
    add_backend_option,
    add_command,
    choose_backend,
    count,
    load_keras,
    require,
)
from fastsepconv.cli.recipe import LAST, Recipe
from fastsepconv.cli.train import add_recipe_arguments, execute, show_operations

if TYPE_CHECKING:
    from fastsepconv.cli.side_by_side import Comparison, GradientErrors
    from fastsepconv.cli.training import Outcome

# Ninety small steps: few enough for two trainings in the time, and enough for 98.9 % and more on every seed that was
# tried. Batch normalisation's moving averages have to follow within them, hence the low momentum.
RECIPE = Recipe(epochs=2, batch_size=32, schedule="cosine", shift=4, momentum=0.8)

SAMPLES = 12
SHOWN_GRADIENTS = 6  # the worst ones, each in a row of its own
MOST_MISTAKEN, MOST_APART = 0.02, 0.01
OUTPUT_LIMIT, GRADIENT_LIMIT, FLOAT64_LIMIT = 1e-4, 1e-3, 1e-9

DESCRIPTION = """The main job, end to end, on real images: scikit-learn's 1,797 handwritten digits, scanned
at 8x8 and brought here to 48x48x1. It writes the tutorial's X_train.npy, X_test.npy, y_train.npy
and y_test.npy, trains the tutorial's Xception on FastSeparableConv2D with the code behind
`fastsepconv train`, trains it again on Keras's SeparableConv2D from the same initial weights and
batches, and then puts the same weights in both: outputs, gradients and times, side by side."""

EXAMPLES = (
    "fastsepconv demo",
    "fastsepconv demo --out /tmp/demo --seed 1 --json",
    "KERAS_BACKEND=torch fastsepconv demo --backend cuda    all of it on a card",
    "fastsepconv demo --images 400 --num-blocks 1 --epochs 2    a quick look; accuracy is not judged then",
)

EXITS = {
    OK: "both networks agree: outputs within 1e-4, each gradient within 1e-3, both within 1e-9 in float64; "
    "held-out\n       accuracy is at least 98 % and within one point of Keras's",
    CHECK_FAILED: "they do not, or accuracy does not get there",
}


class Check(NamedTuple):
    """A figure and the limit that it must not exceed."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.value <= self.limit


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    command = add_command(subparsers, "demo", "the main job on real images, beside Keras", DESCRIPTION, EXAMPLES, EXITS)
    command.add_argument(
        "--out", type=Path, default=Path("fastsepconv-demo"), metavar="DIR", help="default: %(default)s"
    )
    command.add_argument("--images", type=count(100), metavar="N", help="take only the first N digits")
    add_backend_option(command)
    add_recipe_arguments(command, RECIPE, leave_out=("--layer", "--dtype", "--order"))


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    began = time.perf_counter()
    console = Console(args.json)
    require(sklearn="scikit-learn", matplotlib="matplotlib", PIL="pillow")
    choose_backend(args.backend)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    recipe = replace(RECIPE, **given)
    source, dataset = _digits(args, console)

    with compiled_meanwhile("float64") if dispatch.explain().name == "cpu" else nullcontext():
        load_keras()
        from fastsepconv.cli import side_by_side

        side_by_side.kernels().exact_float32()
        console.heading("An Xception on FastSeparableConv2D")
        ours = execute(recipe, source, dataset, args.out / "fastsepconv", console)
    console.heading("The same on Keras's SeparableConv2D, from the same initial weights and batches")
    stock = execute(replace(recipe, layer="keras"), source, dataset, args.out / "keras", console)

    show_operations(ours, console)

    from fastsepconv.cli import pictures

    console.heading("The same weights in both networks")
    comparison = side_by_side.compare(ours.model, stock.model, dataset, recipe, console)
    whole = recipe == replace(RECIPE, seed=recipe.seed) and not args.images
    checks = [*_agreement(ours, stock, comparison), *(_accuracy(ours, stock) if whole else ())]
    _show(ours, stock, comparison, checks, console)
    picture = args.out / "demo.png"
    histories = ours.state["history"], stock.state["history"]
    pictures.demo_sheet(*histories, dataset.test.x, dataset.test.y, ours.probabilities, picture)

    passed = all(check.passed for check in checks)
    seconds = time.perf_counter() - began
    console.say(f"  picture  {picture}")
    console.say(f"  try      fastsepconv predict {args.out / 'images'} --model {args.out / 'fastsepconv' / LAST}")
    if not whole:
        console.say("\nAccuracy was not judged: this is not the whole demo.")
    verdict = ("All checks passed", "bold green") if passed else ("A check failed", "bold red")
    console.say(f"\n{verdict[0]} after {seconds:.0f} s.", verdict[1])
    console.document(
        {
            "passed": passed,
            "checks": [{**check._asdict(), "passed": check.passed} for check in checks],
            "held_out_accuracy": {"fastsepconv": ours.accuracy, "keras": stock.accuracy},
            "same_weights": side_by_side.document(comparison),
            "compilation": {"kernels": len(ours.compilation.kernels), "seconds": ours.compilation.seconds},
            "recipe": ours.state["recipe"],
            "history": {"fastsepconv": histories[0], "keras": histories[1]},
            "picture": str(picture),
            "seconds": seconds,
        }
    )
    return OK if passed else CHECK_FAILED


def _digits(args: argparse.Namespace, console: Console) -> tuple[data.Source, data.Dataset]:
    """Write the tutorial's files, and a few held-out images as pictures; load the files as `train` does."""
    from PIL import Image

    folder, pictures = args.out / "data", args.out / "images"
    data.write_digits(folder, args.seed, limit=args.images)
    source = data.Source("folder", str(folder.resolve()))
    dataset = data.load(source)
    pictures.mkdir(exist_ok=True)
    for earlier in pictures.glob("[0-9][0-9]_is_[0-9].png"):  # of another seed: now they may be trained on
        earlier.unlink()
    for index, (x, y) in enumerate(zip(dataset.test.x[:SAMPLES], dataset.test.y, strict=False)):
        Image.fromarray(x[..., 0]).save(pictures / f"{index:02}_is_{y}.png")
    console.heading("Real images: scikit-learn's handwritten digits, scanned at 8x8, brought to 48x48x1")
    console.say(f"  {len(dataset.train.y)} to train on, {len(dataset.test.y)} held out; in {folder}/")
    return source, dataset


def _agreement(ours: Outcome, stock: Outcome, comparison: Comparison) -> list[Check]:
    same_start = ours.state["initial_weights"] == stock.state["initial_weights"]
    return [
        Check("initial weights, differing networks", float(not same_start), 0.0),
        Check("outputs, largest difference", comparison.output_error, OUTPUT_LIMIT),
        Check("gradients, worst of all variables", comparison.gradient_error, GRADIENT_LIMIT),
        Check("float64 outputs, largest difference", comparison.float64_output_error, FLOAT64_LIMIT),
        Check("float64 gradients, worst of all variables", comparison.float64_gradient_error, FLOAT64_LIMIT),
    ]


def _accuracy(ours: Outcome, stock: Outcome) -> list[Check]:
    return [
        Check("held-out images mistaken", 1 - ours.accuracy, MOST_MISTAKEN),
        Check("held-out accuracy, distance to Keras's", abs(ours.accuracy - stock.accuracy), MOST_APART),
    ]


def _show(ours: Outcome, stock: Outcome, comparison: Comparison, checks: Sequence[Check], console: Console) -> None:
    times = [(f"{each.train_step * 1e3:.0f} ms", f"{each.prediction * 1e3:.0f} ms") for each in comparison.times]
    ratios = [f"{theirs / mine:.2f}x" for mine, theirs in zip(*comparison.times, strict=True)]
    console.table(
        ("", "fastsepconv", "Keras", "ratio"),
        [
            ("held-out accuracy, each as it was trained", f"{ours.accuracy:.2%}", f"{stock.accuracy:.2%}", ""),
            ("held-out accuracy, same weights", *(f"{accuracy:.2%}" for accuracy in comparison.accuracies), ""),
            (f"train step, {comparison.batch_size} images", times[0][0], times[1][0], ratios[0]),
            (f"prediction, {comparison.batch_size} images", times[0][1], times[1][1], ratios[1]),
        ],
    )
    kernels = ours.compilation.kernels
    compiled = (
        f"{len(kernels)} kernels in {ours.compilation.seconds:.1f} s, those of float64 meanwhile by another process"
        if kernels
        else "none: all were on the disk"
    )
    console.say(f"  kernels of the CPU compiled at the first call: {compiled}")
    console.say("\n  gradients of one batch: norm of the difference over norm of Keras's, the worst first")
    console.table(("gradient of", "float32", "float64"), _gradient_rows(comparison.gradients))
    console.table(
        ("check", "value", "limit", ""),
        [
            (check.name, f"{check.value:.1e}", f"{check.limit:.0e}", "passed" if check.passed else "FAILED")
            for check in checks
        ],
    )


def _gradient_rows(gradients: Sequence[GradientErrors]) -> list[tuple[str, str, str]]:
    """The worst gradients in float32, then how many others there are and the worst among those in either dtype."""
    ordered = sorted(gradients, key=lambda errors: _size(errors.float32), reverse=True)
    shown, others = ordered[:SHOWN_GRADIENTS], ordered[SHOWN_GRADIENTS:]
    rows = [(errors.of, errors.float32, errors.float64) for errors in shown]
    if others:
        worst = (max((getattr(errors, dtype) for errors in others), key=_size) for dtype in ("float32", "float64"))
        rows.append((f"the worst of the {len(others)} others", *worst))
    return [(of, f"{single:.1e}", f"{double:.1e}") for of, single, double in rows]


def _size(error: float) -> float:
    """For sorting: NaN, which no comparison places, is worse than any number."""
    return math.inf if math.isnan(error) else error
