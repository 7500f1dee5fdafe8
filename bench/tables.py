"""Tables and the roofline plot of one card: `python bench/tables.py FOLDER`, of the bench.json that pytest wrote there.

`pytest bench/kernels/bench_*.py bench/runs/bench_*.py --benchmark-json=FOLDER/bench.json` writes bench.json. This
writes bench.md and roofline.png beside it. The roofs are those that bench_roofs.py measured in the same run. A row's
share is the time that its flops and bytes imply at the roofs, over the time that was measured.
"""

import argparse
import json
from pathlib import Path

from sparsefw.kernels.cost import Cost

# Parameters that say how an operation is done; all others say what is done.
WAY = "way"


def rows_of(results: dict) -> list[dict]:
    """One row per benchmark: operation, case, way, median and quartiles in seconds, flops, bytes, unit."""
    rows = []
    for bench in results["benchmarks"]:
        parameters = dict(bench["params"] or {})
        way = parameters.pop(WAY, "")
        case = ", ".join(" x ".join(map(str, v)) if isinstance(v, list) else str(v) for v in parameters.values())
        stats = {name: bench["stats"][name] for name in ("median", "q1", "q3")}
        operation = bench["name"].removeprefix("test_").split("[")[0]
        rows.append(dict(operation=operation, case=case, way=way, **stats, **bench["extra_info"]))
    return rows


def roofs_of(rows: list[dict]) -> dict[str, float]:
    """Measured roofs: "copy" in bytes per second, and by precision in flops per second."""
    roofs = {row["case"]: row["flops"] / row["median"] for row in rows if row["operation"] == "matmul"}
    (roofs["copy"],) = (row["bytes"] / row["median"] for row in rows if row["operation"] == "copy")
    return roofs


def share(row: dict, roofs: dict[str, float]) -> float:
    """The share of the roof that a row reaches: 1 is as fast as can be."""
    flops = row["flops"] if row["unit"] else 0
    return Cost(flops, row["bytes"]).seconds(roofs.get(row["unit"], 1.0), roofs["copy"]) / row["median"]


def tables(rows: list[dict], roofs: dict[str, float]) -> str:
    """Markdown with a table for every operation; each row is compared with the Triton kernel in the same case."""
    known = rows[0]
    lines = [f"{known['device']}, torch {known['torch']}, triton {known['triton']}", ""]
    lines += [f"- copy: {roofs['copy'] / 1e9:.0f} GB/s"]
    lines += [f"- {name} product: {rate / 1e12:.1f} Tflop/s" for name, rate in roofs.items() if name != "copy"]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        chosen = [row for row in rows if row["operation"] == operation]
        if operation in ("copy", "matmul"):
            continue
        head = ["case", "way", "ms", "quartiles", "Tflop/s", "GB/s", "share", "/ ours", "note"]
        lines += ["", f"## {operation}", "", _line(head), _line(["---"] * len(head))]
        for row in chosen:
            ours = [other["median"] for other in chosen if other["case"] == row["case"] and other["way"] == "triton"]
            ms = [f"{1e3 * row[name]:.3f}" for name in ("median", "q1", "q3")]
            rates = [f"{row['flops'] / row['median'] / 1e12:.1f}", f"{row['bytes'] / row['median'] / 1e9:.0f}"]
            against = f"{row['median'] / ours[0]:.2f}" if ours else ""
            cells = [row["case"], row["way"], ms[0], f"{ms[1]} to {ms[2]}", *rates, f"{share(row, roofs):.0%}", against]
            lines.append(_line([*cells, row["note"]]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(rows: list[dict], roofs: dict[str, float], path: Path) -> None:
    """Flops per second over flops per byte, with the measured roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row["way"] == "triton" and row["flops"]]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in drawn]
    ends = min(intensities) / 2, max(intensities) * 2
    for name, rate in roofs.items():
        if name != "copy":
            corner = rate / roofs["copy"]
            axes.plot([ends[0], corner, ends[1]], [ends[0] * roofs["copy"], rate, rate], color="grey", linewidth=1)
            axes.text(ends[1], rate, f" {name}", va="center", fontsize=8)
    for operation in dict.fromkeys(row["operation"] for row in drawn):
        points = [(x, row["flops"] / row["median"]) for x, row in zip(intensities, drawn, strict=True)
                  if row["operation"] == operation]  # fmt: skip
        axes.scatter(*zip(*points, strict=True), label=operation, s=18)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="flops per second", title=rows[0]["device"])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read FOLDER/bench.json, write and print the tables, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = rows_of(json.loads((folder / "bench.json").read_text(encoding="utf-8")))
    roofs = roofs_of(rows)
    text = tables(rows, roofs)
    (folder / "bench.md").write_text(text, encoding="utf-8")
    plot(rows, roofs, folder / "roofline.png")
    print(text)


if __name__ == "__main__":
    main()
