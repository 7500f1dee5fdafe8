"""Plot saved runs of `python -m bench`: a roofline, and the share of the roof by operation, or time by shape."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib import pyplot, ticker
except ModuleNotFoundError as error:
    raise SystemExit(f"A plot needs matplotlib: {error}") from None

Row = dict[str, Any]

# Markers, and colours that the colour-blind tell apart.
STYLES = {"ours": "C0o", "torch": "C1s", "compile": "C2^", "library": "C3D", "base": "C4x"}
COLOURS = pyplot.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "black"])
LOOK: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": COLOURS,
}
LOOK |= {"lines.markersize": 5, "lines.linewidth": 1}


def mark(axes: Any, x: float, y: float, row: Row) -> None:
    """Draw a point: hollow for a rival, with the number of the operation for ours."""
    provider = row["provider"]
    if provider != "ours":
        axes.plot(x, y, STYLES[provider], label=provider, fillstyle="none")
        return
    axes.plot(x, y, STYLES[provider], label=provider, markersize=9, zorder=3)
    axes.text(x, y, row["number"], color="white", fontsize=5.5, weight="bold", ha="center", va="center_baseline")


def roofline(axes: Any, rows: Sequence[Row], roofs: dict[str, float]) -> None:
    """Draw flops per second over flops per byte, below the roofs of a copy and of products."""
    for row in rows:
        if row["flops"]:
            mark(axes, row["flops"] / row["bytes"], row["flops"] / row["seconds"], row)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="FLOP/s")
    axes.yaxis.set_major_formatter(ticker.EngFormatter())
    low, high = axes.get_xlim()
    for name, roof in roofs.items():
        ridge = roof / roofs["copy"]
        end = 3 * max(high, ridge)
        if name != "copy":
            axes.plot([low, ridge, end], [low * roofs["copy"], roof, roof], "0.6", zorder=1)
            axes.text(end, roof, name, color="0.4", ha="right", va="bottom")


def shares(axes: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Draw the share of the roof of each operation; several shapes are several points."""
    for row in rows:
        share = 100 * (row["share"] or 0)
        if row["provider"] == "ours":
            axes.barh(row["number"], share, color="#BBD9EA", height=0.7)
        mark(axes, share, row["number"], row)
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set(xlabel="share of the roof in %", xlim=(0, None), ylim=(len(names) + 0.6, 0.4))


def times(axes: Any, rows: Sequence[Row], name: str) -> None:
    """Draw the time of an operation by shape."""
    for row in rows:
        mark(axes, row["rows"] * row["d"], 1e3 * row["seconds"], row)
    axes.set(xscale="log", yscale="log", xlabel="entries of the weight", ylabel=f"ms of {name}")


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot each run in two panels. Operations have numbers; the first one has the best share of the roof."""
    with pyplot.rc_context(LOOK):
        figure, grid = pyplot.subplots(len(runs), 2, figsize=(8, 4.5 * len(runs)), squeeze=False, layout="constrained")
        for run, (left, right) in zip(runs, grid, strict=True):
            rows = [row | {"name": f"{row['operation']} {row['setting']}"} for row in run["rows"] if not row["wrong"]]
            best = {row["name"]: row["share"] or 0 for row in rows if row["provider"] == "ours"}
            names = sorted(best, key=lambda name: -best[name])
            rows = [row | {"number": names.index(row["name"]) + 1} for row in rows if row["name"] in best]
            roofline(left, rows, run["roofs"])
            if len(names) == 1 < len({row["rows"] * row["d"] for row in rows}):
                times(right, rows, *names)
            else:
                shares(right, rows, names)
            left.set_title(run["machine"].get("device", ""), loc="left", fontsize=8)
        handles, labels = right.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True))
        figure.legend(found.values(), found, ncols=5, loc="outside upper center", frameon=False)
        figure.savefig(path, dpi=200)
        pyplot.close(figure)
