"""What has run on a card, and passed: kept as JSON, written by `make test-cuda`, told in the README.

`python -m fastsepconv.bench.cuda_status [--ledger LEDGER.jsonl] [--readme README.md]`

A ledger has two lines a test, each with a card and either operation, tier and dtype or a way to the kernels: "begun",
then "passed", "failed" or "skipped". What none of its lines tell of has never run on that card. The README's tables are
made from the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from .report import put_between_markers, table

FILE = Path(__file__).with_name("results") / "cuda-status.json"
BEGIN, END = "<!-- cuda:begin -->", "<!-- cuda:end -->"
FORMAT = 1
OPERATIONS = tuple(
    f"{kind}_{way}" for kind in ("depthwise", "pointwise", "separable") for way in ("forward", "backward")
)
TIERS = ("plain", "fast")
DTYPES = ("float32", "float64", "float16", "bfloat16")
WAYS = ("array API", "Keras on TensorFlow", "Keras on torch")
PASSED, FAILED, NEVER = "passed", "failed", "never run on a card"


def blank() -> dict:
    """The status of kernels that no card has seen."""
    states = {operation: {tier: dict.fromkeys(DTYPES, NEVER) for tier in TIERS} for operation in OPERATIONS}
    return {"format": FORMAT, "card": None, "date": None, "states": states, "ways": dict.fromkeys(WAYS, NEVER)}


def of_ledger(lines: Iterable[dict], date: str) -> dict:
    """The status that the lines of a ledger give: one failure is enough, and so is a test that did not end."""
    status = blank()
    events: Counter[tuple[str, ...]] = Counter()
    for line in lines:
        names = ("way",) if "way" in line else ("operation", "tier", "dtype")
        events[*(line[name] for name in names), line["event"]] += 1
        status["card"], status["date"] = line["card"], date
    for *what, _ in events:
        begun, passed, failed, skipped = (events[*what, name] for name in ("begun", PASSED, FAILED, "skipped"))
        whole = begun == passed + skipped and not failed
        state = (PASSED if passed else NEVER) if whole else FAILED
        if len(what) == 1:
            status["ways"][what[0]] = state
        else:
            operation, tier, dtype = what
            status["states"][operation][tier][dtype] = state
    return status


def markdown(status: dict) -> str:
    """The README's part: on which card, and a row for each operation and tier."""
    rows = [
        [operation.replace("_", " "), tier, *(states[dtype] for dtype in DTYPES)]
        for operation, tiers in status["states"].items()
        for tier, states in tiers.items()
    ]
    where = f"On {status['card']}, {status['date']}" if status["card"] else "No card has been at hand yet"
    said = f"{where}; `make test-cuda` on a machine with one writes these tables, from its tests' results."
    ways = table(["way to the CUDA kernels", "on a card"], [[*each] for each in status["ways"].items()])
    return f"{said}\n\n{ways}\n\n{table(['CUDA kernels', 'tier', *DTYPES], rows)}\n"


def load(file: Path = FILE) -> dict:
    return json.loads(file.read_text())


def save(status: dict, file: Path = FILE) -> None:
    file.write_text(json.dumps(status, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Bring the JSON up to a ledger, the README up to the JSON, or both; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, help="what `make test-cuda` wrote down")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--file", type=Path, default=FILE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.ledger:
        if not args.ledger.exists():
            print("No test ran on a card: the status stays as it is.", file=sys.stderr)
            return 1
        lines = [json.loads(line) for line in args.ledger.read_text().splitlines()]
        save(of_ledger(lines, _day_of(args.ledger)), args.file)
    said = markdown(load(args.file))
    if args.readme:
        args.readme.write_text(put_between_markers(args.readme.read_text(), said, BEGIN, END))
    print(said)
    return 0


def _day_of(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).date().isoformat()


if __name__ == "__main__":
    sys.exit(main())
