"""What a race on a card says: a line a problem, and the table of geometric means beside what was aimed at. Losses show.

`python -m fastsepconv.bench.cuda_report [RUN.json...] [--readme README.md]`

prints it again, or puts it into the README, of these runs or of all that are kept in bench/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import cuda_status
from .report import LOSSES_IN_README, put_between_markers, table
from .stats import geometric_mean

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- cuda-bench:begin -->", "<!-- cuda-bench:end -->"
NO_RACE = "No race on a card has been kept yet; `make bench-cuda` on a machine with one writes its table here.\n"
OURS, STOCK = "fastsepconv", "stock layers"


class Aim(NamedTuple):
    """How many times as fast as the libraries it should be at least; and where its products are those of wgmma."""

    least: float
    with_wgmma: float | None = None


# By the start of the group's name: the first that fits.
AIMS = {
    "pointwise forward, float32": Aim(1.5),
    "pointwise forward, tf32": Aim(0.6, with_wgmma=0.8),
    "pointwise forward, bfloat16": Aim(0.6, with_wgmma=0.8),
    "depthwise forward": Aim(1.2),
    "depthwise backward": Aim(2.0),
    "separable forward, float32": Aim(1.4),
    "separable forward, tf32": Aim(0.9, with_wgmma=1.1),
    "separable forward, bfloat16": Aim(1.1, with_wgmma=1.3),
    "separable forward+backward": Aim(1.3),
    "xception 299 predict, float32": Aim(1.2),
    "xception 299 train, float32": Aim(1.2),
    "xception 299 predict, bfloat16": Aim(1.0),
    "xception 299 train, bfloat16": Aim(1.0),
}


def aim(group: str) -> Aim | None:
    """What is aimed at for a group; None: nothing."""
    return next((found for begin, found in AIMS.items() if group.startswith(begin)), None)


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its words."""
    return f"{type(error).__name__}: {(str(error).strip() or 'nothing said').splitlines()[0]}"


def groups(run: dict) -> dict[str, list[dict]]:
    """The problems by group, in the order in which they were raced."""
    found: dict[str, list[dict]] = {}
    for record in run["problems"]:
        found.setdefault(record["group"], []).append(record)
    return found


def problem_line(record: dict, ceilings: dict) -> str:
    """One problem: times in microseconds, quartiles, ratios, and how near ours is to what the card can do."""
    parts = []
    for label, entry in record["providers"].items():
        if entry["status"] != "timed":
            parts.append(f"{label} {entry['status']} ({entry['reason']})")
            continue
        times, ratio = entry["seconds"], entry.get("ratio")
        spread = f"({_us(times['q25'])} - {_us(times['q75'])})"
        against = "" if ratio is None else f", {ratio['ratio']:.2f}x{' LOSS' if ratio['ratio'] < 1 else ''}"
        host = f", the host {_us(entry['host_seconds'])} us" if "host_seconds" in entry else ""
        parts.append(f"{label} {_us(times['median'])} us {spread}{host}{against}")
    share = share_of_ceiling(record, ceilings)
    reached = "" if share is None else f" [{100 * share:.0f} % of what the card can do]"
    return f"{record['name']}{reached}: " + "; ".join(parts)


def share_of_ceiling(record: dict, ceilings: dict) -> float | None:
    """The time that copying and multiplying would take at the rates that were measured, over the time it takes."""
    entry = record["providers"][OURS]
    if entry["status"] != "timed":
        return None
    rates = {**ceilings, "float32": max(ceilings["float32"], ceilings["tf32"] / 3)}  # or as three TF32 products
    least = max(record["flops"] / rates[record["numbers"]], record["least_bytes"] / ceilings["copy"])
    return least / entry["seconds"]["median"]


def kept(folder: Path = RESULTS) -> list[Path]:
    """The runs that are kept, one a card."""
    return sorted(file for file in folder.glob("cuda-*.json") if file.name != cuda_status.FILE.name)


def readme_part(runs: list[dict]) -> str:
    """What the README says of these runs."""
    return "\n".join(markdown(run, LOSSES_IN_README) for run in runs) or NO_RACE


def markdown(run: dict, most: int | None = None) -> str:
    """Where it was measured, the table, what was lost, what is missing; of long lists the first `most` lines."""
    parts = [_where(run), _means(run), *_lists(run, most)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _where(run: dict) -> str:
    rates = run["ceilings"]
    facts = [
        f"{run['card']} (driver {run['driver']})",
        f"copies at {rates['copy'] / 1e12:.2f} TB/s",
        "products at " + ", ".join(f"{rates[n] / 1e12:.0f} TFLOP/s ({n})" for n in ("float32", "tf32", "bfloat16")),
        f"{run['tier']} tier",
        ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        run["date"][:10],
    ]
    return "Measured on " + "; ".join(facts) + "."


def _means(run: dict) -> str:
    found = groups(run)
    rivals = list(dict.fromkeys(name for records in found.values() for r in records for name in r["providers"]))
    rivals = [name for name in rivals if name != OURS]
    rows = []
    for group, records in found.items():
        aims = aim(group) or (None, None)
        shares = [share for r in records if (share := share_of_ceiling(r, run["ceilings"])) is not None]
        reached = f"{100 * min(shares):.0f} - {100 * max(shares):.0f} %" if shares else "-"
        cells = [_cell(_ratios(records, rival)) for rival in rivals]
        rows.append([group, reached, *cells, *("-" if least is None else f"{least:g}x" for least in aims)])
    return table(["", "of the card", *(f"x {rival}" for rival in rivals), "aim", "aim with wgmma"], rows)


def _ratios(records: list[dict], rival: str) -> list[float]:
    entries = [record["providers"].get(rival, {}) for record in records]
    return [entry["ratio"]["ratio"] for entry in entries if "ratio" in entry]


def _cell(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    lost = sum(ratio < 1 for ratio in ratios)
    return f"{geometric_mean(ratios):.2f}" + (f" ({lost} of {len(ratios)} lost)" if lost else "")


def _lists(run: dict, most: int | None) -> Iterator[str]:
    """Losses, the worst first; what is not timed, and why; what there was no time for."""
    entries = [(r["name"], label, e) for r in run["problems"] for label, e in r["providers"].items()]
    ratios = sorted((e["ratio"]["ratio"], name, label) for name, label, e in entries if "ratio" in e)
    lost = [f"- {name}: {ratio:.2f}x {label}" for ratio, name, label in ratios if ratio < 1]
    if lost:
        yield _listed(f"Losses, {len(lost)} of {len(ratios)} races", lost, most, "the worst {} of them")
    elif ratios:
        yield f"No race of {len(ratios)} was lost."
    untimed = [
        f"- {name}: {label} {e['status']}, {e['reason']}" for name, label, e in entries if e["status"] != "timed"
    ]
    if untimed:
        yield _listed(f"Not timed, {len(untimed)}", untimed, most, "the first {} of them")
    if run.get("no_networks"):
        yield f"No whole network was raced: {run['no_networks']}."
    if run["left_out"]:
        names = run["left_out"][:most]
        more = " and others" if len(names) < len(run["left_out"]) else ""
        yield f"No time was left for {len(run['left_out'])} problems: {', '.join(names)}{more}."


def _listed(title: str, lines: list[str], most: int | None, which: str) -> str:
    shown = lines[:most]
    return "\n".join([title + (f", {which.format(most)}" if len(shown) < len(lines) else "") + ":", "", *shown])


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}" if seconds < 1e-3 else f"{1e6 * seconds:.0f}"


def main(arguments: list[str] | None = None) -> int:
    """Print runs that were saved, or put them into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN.json", help="default: all that are kept")
    parser.add_argument("--readme", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file")
    args = parser.parse_args(arguments)
    runs = [json.loads(file.read_text()) for file in args.runs or kept()]
    if args.readme:
        args.readme.write_text(put_between_markers(args.readme.read_text(), readme_part(runs), BEGIN, END))
    else:
        print("\n".join(map(markdown, runs)) or NO_RACE, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
