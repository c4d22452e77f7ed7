"""The picture of a run: for each problem a bar a provider, in GFLOP/s, with the machine's peak as a line."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .problems import FLOAT32
from .providers import PROVIDERS
from .results import dtype_of, groups, title

# Okabe and Ito's colours, told apart by every kind of eye; ours is the strong one.
COLOURS = {
    "fastsepconv": "#D55E00",
    "tensorflow": "#0072B2",
    "torch": "#56B4E9",
    "onnxruntime": "#009E73",
    "openvino": "#CC79A7",
}
OTHER_COLOUR = "#999999"
NETWORK_NAMES = {"xception": "Xception at 299x299", "tutorial": "The tutorial's Xception at 48x48"}


def draw(run: dict, folder: Path) -> list[Path]:
    """One PNG a suite of layers in the run, a panel for each pass and batch; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = [group for group in groups(run) if group[1][0]["op"] != "network"]
    mark = "" if dtype_of(run) == FLOAT32 else f"-{dtype_of(run)}"
    return [
        _draw_suite([records for _, records in panels], run, folder / f"{suite}{mark}.png")
        for suite, panels in groupby(layers, key=lambda group: group[1][0]["suite"])
    ]


def _draw_suite(panels: list[list[dict]], run: dict, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = [label for label in _labels(panels) if not PROVIDERS[label.split("#")[0]].apart]
    figure = Figure(figsize=(11, 0.9 + 2.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, records in zip(axes, panels, strict=True):
        _draw_panel(axis, records, labels, run)
    keys = [Patch(color=_colour(label), label=title(label)) for label in labels]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False, fontsize=9)
    machine = (
        f"{run['machine']['cpu']}, {run['threads']} threads, {dtype_of(run)}; medians, with the quartiles as thin lines"
    )
    figure.supxlabel(machine, fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)
    return path


def _draw_panel(axis, records: list[dict], labels: list[str], run: dict) -> None:
    width = 0.84 / len(labels)
    for index, label in enumerate(labels):
        places = [place - 0.42 + (index + 0.5) * width for place in range(len(records))]
        entries = [record["providers"].get(label, {}) for record in records]
        rates = [entry.get("gflops", 0.0) for entry in entries]
        spread = [[_distance(entry, side) for entry in entries] for side in ("q75", "q25")]
        axis.bar(places, rates, 0.92 * width, color=_colour(label), yerr=spread, error_kw={"lw": 0.7, "ecolor": "0.25"})
    peak = run["peak_gflops"][str(run["threads"])]
    highest = max(entry.get("gflops", 0.0) for record in records for entry in record["providers"].values())
    top = 1.08 * max(peak, highest) if peak < 2 * highest else 1.15 * highest
    axis.axhline(peak, color="0.2", lw=1, ls="--")
    at, where = (peak, "") if peak < top else (0.97 * top, "\nabove")
    axis.text(1.003, at, f"peak {peak:.0f}{where}", transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.set_xticks(range(len(records)), [_tick(record) for record in records], fontsize=7.5)
    axis.set_xlim(-0.55, len(records) - 0.45)
    axis.set_ylim(0, top)
    axis.set_ylabel("GFLOP/s")
    axis.set_title(_panel_title(records[0]), fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", lw=0.4, color="0.85")
    axis.set_axisbelow(True)


def _colour(label: str) -> str:
    return COLOURS.get(label.split("#")[0], OTHER_COLOUR)


def _labels(panels: list[list[dict]]) -> list[str]:
    """Who was timed anywhere in the figure, in the order of the run."""
    entries = [pair for records in panels for record in records for pair in record["providers"].items()]
    return list(dict.fromkeys(label for label, entry in entries if entry["status"] == "timed"))


def _distance(entry: dict, side: str) -> float:
    """From the median rate to the rate of a quartile of the times: the slow quartile is the lower end."""
    if entry.get("status") != "timed":
        return 0.0
    times = entry["seconds"]
    return abs(entry["gflops"] * (times["median"] / times[side] - 1))


def _tick(record: dict) -> str:
    """The shape; what is not plain in its geometry has lines of its own, for two layers may differ in that alone."""
    geometry = "".join(f"\n{part}" for part in record["name"].split("/")[1].split(",")[1:])
    filters = f" to {record['filters']}" if record["op"] != "depthwise" else ""
    return f"{record['size']}x{record['size']}\n{record['channels']}{filters}{geometry}"


def _panel_title(record: dict) -> str:
    words = {"forward": "forward", "backward": "forward and backward"}[record["mode"]]
    rotated = ", weights rotated" if record["weight_sets"] > 1 else ""
    network = NETWORK_NAMES.get(record["suite"], record["suite"])
    return f"{network}: {record['op']} convolution, {words}, batch {record['batch']}{rotated}"
