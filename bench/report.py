"""Write results of `python -m bench` as Markdown that also reads well in a terminal, and report saved runs.

`__main__.py` tells what the columns are. "2 late" are calls that waited for the host, so that they seem too long.

A report begins with what to look at: wrong results, cases far below the expected share of the roof, and cases in which
another provider is faster. Times of several runs, and of a base, are compared at the end.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Run = dict[str, Any]

# Expected shares of the roof, by capability, operation and setting: by bench/expected.py, of a large weight in bf16.
EXPECTED = json.loads(Path(__file__).with_name("results").joinpath("expected.json").read_text("utf-8"))
# A case that reaches less than this part of the expected share is marked.
LOW = 0.7
# A lower speedup is written as 0.99 or less, and is a loss.
EVEN = 0.995
HEAD = ["provider", "median ms", "20 %", "80 %", "rounds", "GB/s", "GFLOP/s", "of roof", "speedup", "error"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Write a table with aligned columns: texts to the left, numbers to the right.

    Args:
        head: names of the columns.
        rows: cells. A row may end early, with a text that is wider than its column.
        texts: number of columns of texts, which come first.
    """
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*[row for row in rows if len(row) == len(head)], strict=True)]
    rows.insert(1, ["-" * width if n < texts else "-" * (width - 1) + ":" for n, width in enumerate(widths)])
    padded = ([f"{cell:{'<>'[n >= texts]}{widths[n]}}" for n, cell in enumerate(row)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def plain(rows: Sequence[Sequence[str]]) -> str:
    """Write a table without aligned columns, for long texts. The first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def case(row: Row) -> str:
    """Name the case of a row."""
    name = f"{row['operation']} {row['setting']}".rstrip()
    return f"{name}, {row['rows']}x{row['d']} {row['dtype']}, {row['tokens']} tokens"


def title(row: Row, roofs: dict[str, float]) -> str:
    """Name the case of a row, its cost, and the roof that bounds it."""
    flops, unit = row["flops"], row["unit"]
    bound = f"bound by {unit if unit and flops / roofs.get(unit, 1) > row['bytes'] / roofs['copy'] else 'bytes'}"
    if unit and unit not in roofs:
        bound = f"no roof of {unit} here"
    return f"{case(row)}: {flops / 1e9:.3g} Gflop, {row['bytes'] / 1e6:.4g} MB, {bound}"


def heading(run: Run) -> str:
    """Write the machine and its roofs."""
    machine = ", ".join(f"{name} {value}" for name, value in run["machine"].items() if value is not None)
    roofs = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in run["roofs"].items())
    return f"{machine}\n\nRoofs in GB/s and GFLOP/s: {roofs}"


def expected(row: Row, machine: Row) -> Row:
    """Return the expected share of the roof and its limit: a share of 0 for a rival, or if none is known."""
    # Smaller weights do not fill a GPU.
    if row["provider"] != "ours" or row["dtype"] != "bfloat16" or row["rows"] * row["d"] < 2**24:
        return {"share": 0}
    return EXPECTED.get(machine["capability"], {}).get(row["operation"], {}).get(row["setting"], {"share": 0})


def table(rows: Iterable[Row], machine: Row) -> str:
    """Write the rows of a case. A wrong result has no time."""
    cells = []
    for row in rows:
        if row["wrong"]:
            cells.append([row["provider"], row["wrong"]])
            continue
        own, hoped = row["seconds"], expected(row, machine)["share"]
        cells.append([
            row["provider"],
            *(f"{1e3 * row[name]:,.3f}" for name in ("seconds", "low", "high")),
            f"{row['rounds']}" + f", {row['late']} late" * bool(row["late"]),
            *(f"{row[name] / own / 1e9:,.1f}" for name in ("bytes", "flops")),
            write(row["share"], ".0%") + f" of {hoped:.0%}" * bool(hoped),
            write(row["speedup"], ".2f"),
            write(row["error"], ".0e"),
        ])  # fmt: skip
    return markdown(HEAD, cells)


def write(value: float | None, form: str) -> str:
    """Write a number; "-" for None."""
    return "-" if value is None else format(value, form)


def remark(row: Row, machine: Row) -> str:
    """Tell why to look at a row first; nothing if there is no reason."""
    reasons = [row["wrong"]] if row["wrong"] else []
    share, speedup, hoped = row["share"], row["speedup"], expected(row, machine)
    if share and share < LOW * hoped["share"]:
        reasons.append(f"low: {share:.0%} of the roof, {hoped['share']:.0%} expected, limit: {hoped['limit']}")
    if row["provider"] == "ours" and speedup and speedup < EVEN:
        reasons.append(f"slower: {speedup:.2f} x the speed of another provider")
    return "; ".join(reasons)


def summary(rows: Sequence[Row]) -> str:
    """Write a line for each case: ours, and the speedup over the fastest rival."""
    cells, rivals = [], {}
    for row in rows:
        if row["seconds"] and row["provider"] not in ("ours", "base"):
            rivals.setdefault(case(row), []).append((row["seconds"], row["provider"]))
    for row in rows:
        if row["seconds"] and row["provider"] == "ours":
            _, rival = min(rivals.get(case(row), [(0, "-")]))
            numbers = f"{1e3 * row['seconds']:,.3f}", write(row["share"], ".0%"), write(row["speedup"], ".2f")
            cells.append([case(row), rival, *numbers])
    return markdown(["case", "fastest rival", "median ms", "of roof", "speedup"], cells, texts=2)


def section(run: Run) -> list[str]:
    """Write the machine, what to look at first, a summary, and a table for each case."""
    rows, machine = run["rows"], run["machine"]
    remarks = [f"- {case(row)}, {row['provider']}: {why}" for row in rows if (why := remark(row, machine))]
    parts = {}
    for row in rows:
        parts.setdefault(title(row, run["roofs"]), []).append(row)
    return [
        f"## {machine['device']}",
        f"`{run['command']}`",
        heading(run),
        *["Look at these first:", "\n".join(sorted(remarks, key=lambda text: ": slower" in text))] * bool(remarks),
        summary(rows),
        *(f"### {name}\n\n{table(part, machine)}" for name, part in parts.items()),
    ]


def comparison(runs: dict[str, Run]) -> list[str]:
    """Compare milliseconds of ours, at the base and now, in all runs; in brackets the speedup over the first one."""
    timed = {}
    for name, run in runs.items():
        for row in sorted(run["rows"], key=lambda row: row["provider"]):
            if row["provider"] in ("base", "ours") and row["seconds"]:
                timed.setdefault(f"{name}: {row['provider']}", {})[case(row)] = 1e3 * row["seconds"]
    first, *others = timed.values() or [{}]
    shared = [key for key in first if all(key in times for times in others)]
    cells = ([key, *(f"{x[key]:,.3f} ({first[key] / x[key]:.2f})" for x in timed.values())] for key in shared)
    return ["### Comparison", markdown(["ms (speedup)", *timed], cells)] * bool(others and shared)


def read(path: Path) -> Run:
    """Read a saved run.

    Raises:
        OSError, ValueError: the file is not there, or has no such run.
    """
    run = json.loads(path.read_text("utf-8"))
    if not isinstance(run, dict) or not run.get("rows"):
        raise ValueError("it has no rows of operations")
    return run


def output(text: str) -> Path:
    """Read the name of a file that can be written.

    Raises:
        ArgumentTypeError: its folder is not there.
    """
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return Path(text)


def plotter(text: str) -> partial[None]:
    """Read the name of a plot's file; returns a function that plots runs to it, and needs matplotlib already."""
    from plots import plot

    return partial(plot, path=output(text))


def main(argv: Sequence[str]) -> int:
    """Print the report, and plot the runs."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a run, by `python -m bench --json FILE`")
    parser.add_argument("--plot", type=plotter, metavar="FILE", help="plot the runs to this file, by matplotlib")
    arguments = parser.parse_args(argv)
    runs = {}
    for path in arguments.files:
        try:
            runs[str(path)] = read(path)
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    print("\n\n".join([part for run in runs.values() for part in section(run)] + comparison(runs)))
    if arguments.plot:
        arguments.plot([*runs.values()])
    return 0
