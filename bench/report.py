"""What a run says: lines for the terminal, and the tables for the README. Losses are shown wherever wins are.

`python -m fastsepconv.bench.report RUN.json... [--readme README.md [--marker bench]] [--details DETAILS.md]
[--figures FOLDER]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from . import results
from .problems import BFLOAT16, FLOAT32
from .providers import PROVIDERS, Entry
from .race import DISTURBED
from .results import dtype_of, groups, limit, share, title
from .stats import geometric_mean

LOSSES_IN_README = 12
FROZEN = "fastsepconv-frozen"
_PEAKS = {FLOAT32: "fused multiply-add", BFLOAT16: "bfloat16 multiply-add"}
_LIMITS = {"peak": "", "copy": " of copy"}  # in tables, where a share is one of the peak unless it says otherwise
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def problem_lines(record: dict, run: dict) -> Iterator[str]:
    """One problem, for the terminal; the last column is the time over the baseline's time."""
    yield _problem_title(record)
    of = limit([record], run)
    for label, entry in record["providers"].items():
        name = f"  {label:<19}"
        if entry["status"] == "absent":  # said once, before the first problem
            continue
        if entry["status"] != "timed":
            yield f"{name} {entry['status']}: {entry['reason'].strip().splitlines()[-1]}"
            continue
        times = entry["seconds"]
        spread = f"({_ms(times['q25'])} - {_ms(times['q75'])})"
        reached = f"{100 * share(record, entry, run, of):3.0f} % of {of}"
        first = f"first call {entry['first_call_seconds']:.2f} s"
        yield f"{name} {_ms(times['median']):>7} ms {spread:<17} {reached}  {first}{_verdict(label, entry)}"
    if record["others_share"] > DISTURBED:
        yield f"  disturbed: other processes used {100 * record['others_share']:.0f} % of the machine meanwhile"


def _verdict(label: str, entry: dict) -> str:
    if "times_baseline" not in entry:
        return ""
    against = entry["times_baseline"]
    note = "  apart" if _provider(label).apart else "  LOSS" if against["ratio"] < 1 else ""
    return f"  {against['ratio']:.2f}x ({against['q25']:.2f} - {against['q75']:.2f}){note}"


def summary_lines(run: dict) -> Iterator[str]:
    """Geometric means and losses, for the terminal."""
    for name, records in groups(run):
        for label in rivals(records):
            ratios = _ratios(records, label)
            slowest = min(ratios)
            yield (
                f"{name}: {run['baseline']} is {geometric_mean(ratios):.2f}x as fast as {label} "
                f"(geometric mean of {len(ratios)}, lowest {slowest:.2f}x, {sum(r < 1 for r in ratios)} lost)"
            )
    wrong = [
        f"{record['name']}: {label} not timed, {entry['reason'].strip().splitlines()[-1]}"
        for record in run["problems"]
        for label, entry in record["providers"].items()
        if entry["status"] in ("wrong", "failed")
    ]
    yield from wrong


def rivals(records: list[dict]) -> list[str]:
    """Who was raced against the baseline in these problems; what stands apart is left out."""
    entries = [pair for record in records for pair in record["providers"].items()]
    return list(dict.fromkeys(label for label, entry in entries if _is_rival(label, entry)))


def _is_rival(label: str, entry: dict) -> bool:
    return "times_baseline" in entry and not _provider(label).apart


def markdown(run: dict) -> str:
    """The README's part: the machine, the geometric means, the networks, the instrument, the losses."""
    tables = _summary_table(run), _networks_table(run), _constants_table(run)
    parts = [_machine_line(run), *tables, _instrument_line(run), _losses(run, most=LOSSES_IN_README)]
    return "\n\n".join(part for part in parts if part) + "\n"


def details(run: dict) -> str:
    """Every problem with every provider's time."""
    parts = [f"# Every problem of the run\n\n{_machine_line(run)}"]
    for name, records in groups(run):
        if records[0]["op"] == "network":
            continue
        labels = list(dict.fromkeys(label for record in records for label in _timed(record)))
        rows = [[_shape(record), *(_cell(record, label, run) for label in labels)] for record in records]
        parts.append(f"## {name}\n\n" + table(["problem", *map(title, labels)], rows))
    parts += [_networks_table(run), _constants_table(run), _instrument_line(run), _losses(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def put_between_markers(text: str, generated: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError where they are missing."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"Invalid value for argument `readme`. Expected one {begin} and one {end} after it.")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{generated}{end}{after}"


def _machine_line(run: dict) -> str:
    machine, peak = run["machine"], run["peak_gflops"]
    caches = ", ".join(f"{name} {size}" for name, size in machine.get("caches", {}).items())
    versions = {name: version for provider in run["versions"].values() for name, version in provider.items()}
    facts = [
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine.get('features', []))}; {caches})",
        f"{run['threads']} threads for every provider",
        f"measured {_PEAKS[dtype_of(run)]} peak " + ", ".join(f"{rate:.0f} GFLOP/s ({n})" for n, rate in peak.items()),
        _copying(run),
        f"{machine['system']}, Python {machine['python']}, " + ", ".join(f"{n} {v}" for n, v in versions.items()),
        _commits(run),
        f"governor {machine['governor']}" if "governor" in machine else "",
        run["date"][:10],
    ]
    return "Measured on " + "; ".join(fact for fact in facts if fact) + "."


def _copying(run: dict) -> str:
    """Where it was measured."""
    rates = ", ".join(f"{rate:.0f} GB/s ({n})" for n, rate in run.get("copy_gbytes", {}).items())
    return f"copies at {rates}" if rates else ""


def _commits(run: dict) -> str:
    """Of a merged run, as far as they were recorded."""
    commits = run.get("commits", [])
    return "commit " + " and ".join(commit or "one not recorded" for commit in commits) if any(commits) else ""


def _instrument_line(run: dict) -> str:
    """What the checks of the instrument found that were merged into the run."""
    checks = run.get("checks")
    if not checks:
        return ""
    ratios = [check["ratio"] for check in checks]
    failed = [f"{check['name']} {check['ratio']:.3f}" for check in checks if not check["passed"]]
    verdict = f"{len(failed)} of {len(checks)} failed ({'; '.join(failed)})" if failed else f"all {len(checks)} passed"
    return (
        "The instrument was checked by ratios that should be 1, a provider against itself and its time in a race over "
        f"its time alone: {min(ratios):.3f} to {max(ratios):.3f}, {verdict}."
    )


def _summary_table(run: dict) -> str:
    kept = [(name, records) for name, records in groups(run) if records[0]["op"] != "network"]
    if not kept:
        return ""
    labels = list(dict.fromkeys(label for _, records in kept for label in rivals(records)))
    rows = []
    for name, records in kept:
        of = limit(records, run)
        shares = [share(record, entry, run, of) for record, entry in _baseline_entries(records, run)]
        reached = f"{100 * min(shares):.0f} - {100 * max(shares):.0f} %{_LIMITS[of]}" if shares else "-"
        rows.append([name, reached, *(_mean_cell(_ratios(records, label)) for label in labels)])
    return table(["layers", "of peak", *(f"x {title(label)}" for label in labels)], rows)


def _networks_table(run: dict) -> str:
    records = [record for record in run["problems"] if record["op"] == "network"]
    if not records:
        return ""
    labels = list(dict.fromkeys(label for record in records for label in _timed(record)))
    rows = [[_problem_title(record), *(_cell(record, label, run) for label in labels)] for record in records]
    return table(["whole networks", *map(title, labels)], rows)


def _constants_table(run: dict) -> str:
    """`freeze` against the others whose weights are constants: how many times longer they take; a loss is bold."""
    records = [record for record in run["problems"] if record["op"] == "network" and FROZEN in _timed(record)]
    timed = list(dict.fromkeys(label for record in records for label in _timed(record)))
    labels = [label for label in timed if _provider(label).inference_only and not _provider(label).apart]
    if not labels:
        return ""
    rows = []
    for record in records:
        ours = record["providers"][FROZEN]["seconds"]["median"]
        row = [_problem_title(record), f"{_ms(ours)} ms"]
        for label in labels:
            theirs = record["providers"].get(label, {}).get("seconds")
            ratio = f"{theirs['median'] / ours:.2f}x" if theirs else "-"
            row.append(f"**{ratio}**" if theirs and theirs["median"] < ours else ratio)
        rows.append(row)
    return table(["weights constant", title(FROZEN), *(f"x {title(label)}" for label in labels)], rows)


def _losses(run: dict, most: int | None = None) -> str:
    """The problems in which somebody beats the baseline, the worst first: all, or `most` of them and how many."""
    found = [
        (entry["times_baseline"]["ratio"], record, label)
        for record in run["problems"]
        for label, entry in record["providers"].items()
        if _is_rival(label, entry) and entry["times_baseline"]["ratio"] < 1
    ]
    raced = sum(_is_rival(label, entry) for record in run["problems"] for label, entry in record["providers"].items())
    if not found:
        return f"Losses: none in {raced} races."
    kept = sorted(found, key=lambda loss: loss[0])[:most]
    lines = [f"- {_problem_title(record)}: {ratio:.2f}x {title(label)}" for ratio, record, label in kept]
    which = f", the worst {len(kept)} of them" if len(kept) < len(found) else ""
    return f"Losses, {len(found)} of {raced} races{which}:\n\n" + "\n".join(lines)


def _baseline_entries(records: list[dict], run: dict) -> list[tuple[dict, dict]]:
    """The problems in which the baseline was timed, each with its entry."""
    entries = [(record, record["providers"].get(run["baseline"], {"status": "absent"})) for record in records]
    return [pair for pair in entries if pair[1]["status"] == "timed"]


def _ratios(records: list[dict], label: str) -> list[float]:
    entries = [record["providers"].get(label, {}) for record in records]
    return [entry["times_baseline"]["ratio"] for entry in entries if "times_baseline" in entry]


def _mean_cell(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    lost = sum(ratio < 1 for ratio in ratios)
    return f"{geometric_mean(ratios):.2f}" + (f" ({lost} of {len(ratios)} lost)" if lost else "")


def _cell(record: dict, label: str, run: dict) -> str:
    """Such as "1.56 ms, 1.42x"; a loss is bold; the baseline shows its share of the peak, or of copying."""
    entry = record["providers"].get(label, {"status": "absent"})
    if entry["status"] != "timed":
        return "not timed" if entry["status"] in ("wrong", "failed") else "-"
    time = f"{_ms(entry['seconds']['median'])} ms"
    if "times_baseline" not in entry:
        of = limit([record], run)
        return f"{time}, {100 * share(record, entry, run, of):.0f} %{_LIMITS[of]}"
    ratio = f"{entry['times_baseline']['ratio']:.2f}x"
    lost = _is_rival(label, entry) and entry["times_baseline"]["ratio"] < 1
    return f"{time}, **{ratio}**" if lost else f"{time}, {ratio}"


def _provider(label: str) -> Entry:
    return PROVIDERS[label.split("#")[0]]  # one that is raced against itself has a number


def _timed(record: dict) -> list[str]:
    return [label for label, entry in record["providers"].items() if entry["status"] == "timed"]


def _shape(record: dict) -> str:
    uses = f" (x{record['uses']})" if record["uses"] > 1 else ""
    return record["name"].split("/")[1] + uses


def _problem_title(record: dict) -> str:
    return record["name"].replace("/", " ")


def _ms(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    """Write what was asked for; with no option, the README's part goes to standard output."""
    parser = argparse.ArgumentParser("python -m fastsepconv.bench.report", description="The report of saved runs.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN.json", help="from `fastsepconv bench [--check] --save`"
    )
    parser.add_argument("--readme", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file")
    parser.add_argument("--marker", default="bench", help="another word than bench in these two: one for each machine")
    parser.add_argument("--details", type=Path, help="write every problem's table to this file")
    parser.add_argument("--figures", type=Path, help="write one picture a suite into this folder")
    args = parser.parse_args(arguments)
    try:
        run = results.merge([results.load(path) for path in args.runs])
        if args.readme:
            markers = (f"<!-- {args.marker}:{end} -->" for end in ("begin", "end"))
            args.readme.write_text(put_between_markers(args.readme.read_text(), markdown(run), *markers))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 3
    if args.details:
        args.details.write_text(details(run))
    if args.figures:
        from . import figure

        for path in figure.draw(run, args.figures):
            print(path)
    if not (args.readme or args.details or args.figures):
        print(markdown(run), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
