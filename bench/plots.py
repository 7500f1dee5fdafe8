"""Plot saved runs of `python -m bench`: a roofline, and the share of the roof by operation, setting and shape."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib import pyplot, ticker
except ModuleNotFoundError as error:
    raise SystemExit(f"python -m bench: error: a plot needs matplotlib: {error}") from None

# Markers, in colours that the colour-blind tell apart.
STYLES = {"ours": "C0o", "torch": "C2s", "compile": "C1^", "library": "C3D", "base": "kx"}
LOOK = ["seaborn-v0_8-colorblind", {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}]


def mark(axes: Any, x: float, y: float, provider: str, number: int) -> None:
    """Draw a point: hollow for a rival, with the number of the case for ours."""
    ours = provider == "ours"
    form = dict(markersize=9, zorder=3) if ours else dict(markersize=5, fillstyle="none")
    axes.plot(x, y, STYLES[provider], label=provider, **form)
    if ours:
        axes.text(x, y, number, color="white", fontsize=5.5, weight="bold", ha="center", va="center_baseline")


def draw_roofs(axes: Any, roofs: dict[str, float]) -> None:
    """Draw the roofs of a copy and of products over the points."""
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="FLOP/s")
    axes.yaxis.set_major_formatter(ticker.EngFormatter())
    low, high = axes.get_xlim()
    for name, roof in roofs.items():
        ridge = roof / roofs["copy"]
        end = 3 * max(high, ridge)
        if name != "copy":
            axes.plot([low, ridge, end], [low * roofs["copy"], roof, roof], "0.6", zorder=1)
            axes.text(end, roof, name, color="0.4", ha="right", va="bottom")


def draw(run: dict[str, Any], left: Any, right: Any) -> None:
    """Draw a run. Its cases have numbers; the first one has the best share of the roof."""
    cases = {}
    for row in run["rows"]:
        if row["share"]:
            name = f"{row['operation']} {row['setting']} {row['rows']}x{row['d']}".replace("  ", " ")
            cases.setdefault(name, []).append(row)
    best = {name: row["share"] for name, rows in cases.items() for row in rows if row["provider"] == "ours"}
    names = sorted(best, key=lambda name: -best[name])
    for number, name in enumerate(names, 1):
        right.barh(number, 100 * best[name], color="#BBD9EA", height=0.7)
        for row in cases[name]:
            mark(right, 100 * row["share"], number, row["provider"], number)
            if row["flops"]:
                mark(left, row["flops"] / row["bytes"], row["flops"] / row["seconds"], row["provider"], number)
    draw_roofs(left, run["roofs"])
    left.set_title(run["machine"]["device"], loc="left", fontsize=8)
    right.axvline(100, color="0.6", zorder=1)
    right.set_yticks(range(1, len(names) + 1), names)
    right.set(xscale="log", xlabel="share of the roof in %", ylim=(len(names) + 0.6, 0.4))
    right.xaxis.set_major_formatter("{x:g}")


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot each run in a row of two panels."""
    cases = max(sum(row["provider"] == "ours" for row in run["rows"]) for run in runs)
    size = 8, max(3.5, 1 + 0.19 * cases) * len(runs)
    with pyplot.style.context(LOOK):
        figure, grid = pyplot.subplots(len(runs), 2, figsize=size, squeeze=False, layout="constrained")
        for run, panels in zip(runs, grid, strict=True):
            draw(run, *panels)
        found = {x.get_label(): x for axes in grid[:, 1] for x in axes.lines if x.get_label() in STYLES}
        figure.legend(found.values(), found, ncols=5, loc="outside upper center", frameon=False)
        figure.savefig(path, dpi=200)
