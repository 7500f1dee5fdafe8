"""Pictures of a quality study: relative error by layer, and errors by Frank-Wolfe step."""

import re
from pathlib import Path

import matplotlib
from quality_curves import PATTERN

matplotlib.use("Agg")
from matplotlib import pyplot

# Lines of the plot by layer: method, which of its errors, label.
BY_LAYER = (
    ("best 1-swaps from Wanda", "error_mask", "1-swaps"),
    ("the paper's (`--preset paper --steps 100`)", "error_mask", "the paper's, 100 steps"),
    ("masks only (`--refit 0`)", "error_mask", "masks only"),
    ("SparseGPT", "error", "SparseGPT"),
    ("ADMM", "error", "ADMM"),
    ("layer by layer (`--target layer --reconstruct 0`)", "error_mask", "layer by layer, mask alone"),
    ("layer by layer (`--target layer --reconstruct 0`)", "error", "layer by layer"),
    ("without reconstruction (`--reconstruct 0`)", "error", "the default's, of their targets"),
)


def plot(results: dict, cells: list, folder: Path) -> None:
    """Relative errors by layer, a picture for each selected pattern; errors by Frank-Wolfe step, one for each block."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in dict.fromkeys(cell.pattern for cell in cells):
        entries = [results["cells"].get(cell.key) for cell in cells if cell.pattern == pattern]
        # The first of several seeds and numbers of windows.
        runs = {run["method"]: run["layers"] for run in reversed(entries) if run}
        lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for method, what, label in (row for row in BY_LAYER if row[0] in runs):
            columns = (runs[method][name] for name in ("name", what, "error_warm_start"))
            for name, error, warm in zip(*columns, strict=True):
                # "model.layers.3.self_attn.q_proj.weight" is q_proj at 3.
                kind, block = name.split(".")[-2], int(re.search(r"\.(\d+)\.", name)[1])
                lines.setdefault(kind, {}).setdefault(label, []).append((block, error / warm if warm else 1.0))
        if lines:
            what = f"error relative to Wanda's mask, {pattern}"
            _panels(lines, "block", what, folder / f"layers-{pattern.replace(':', '-')}.png")
    for block, kinds in results["curves"].items():
        lines = {}
        for kind, measured in kinds.items():
            for name, points in measured.items():
                lines.setdefault(kind, {})[f"{name}, relaxed"] = [(t, relaxed) for t, relaxed, _ in points]
                lines[kind][f"{name}, rounded"] = [(t, rounded) for t, _, rounded in points]
        what = f"error relative to Wanda's mask, {PATTERN}, block {block}"
        # The open loop's first steps go to fifty times the warm start's error.
        _panels(lines, "Frank-Wolfe steps", what, folder / f"steps-block-{block}.png", top=1.2)


def _panels(
    lines: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str, path: Path, top: float | None = None
) -> None:
    """A panel for each key, with a line for each label; lines of relaxed errors are dashed."""
    width = min(4, len(lines))
    height = -(-len(lines) // width)
    figure, axes = pyplot.subplots(
        height, width, figsize=(3.6 * width, 2.9 * height + 0.8), sharey=True, squeeze=False, layout="constrained"
    )
    colors: dict[str, str] = {}
    for axis, (title, by_label) in zip(axes.flat, lines.items(), strict=False):
        for label, points in by_label.items():
            color = colors.setdefault(re.sub(", (relaxed|rounded)$", "", label), f"C{len(colors)}")
            dashed = label.endswith("relaxed")
            axis.plot(*zip(*points, strict=True), "--" if dashed else "-", color=color, label=label, linewidth=1.2)
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    # Shared by all panels, so only once everything is drawn.
    axes.flat[0].set_ylim(bottom=0, top=top)
    figure.suptitle(y)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
