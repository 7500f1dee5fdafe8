"""Report saved runs of `python -m bench` in Markdown.

First comes what to look at: wrong results, cases far below the expected share of the roof, and cases in which another
provider is faster. Times of several runs, and of a base, are compared at the end.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]
Run = dict[str, Any]

# Expected shares of the roof, by capability, operation and setting (bench/expected.py).
EXPECTED = Path(__file__).resolve().parent / "results" / "expected.json"
# A case that reaches less than this part of the expected share is marked.
LOW = 0.7
HEAD = """
| setting | shape | tokens | dtype | provider | ms (20-80 %) | GB/s | GFLOP/s | of the roof | speedup | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def read(path: Path) -> Run:
    """Read a saved run: an object, or JSON lines with a row each and others that describe the run.

    A row gets the name of its "case", and the "expected" share of the roof: 0 for a rival, or if none is known.

    Raises:
        OSError, ValueError, TypeError: the file is not there, or has no such run.
    """
    run: Run = {"machine": {}, "command": "", "roofs": {}, "rows": []}
    text = path.read_text("utf-8")
    for part in map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text]):
        if "operation" in part:
            run["rows"].append(part)
        else:
            run |= part
    if not run["rows"]:
        raise ValueError("it has no rows of operations")
    known = json.loads(EXPECTED.read_text("utf-8")) if EXPECTED.exists() else {}
    for row in run["rows"]:
        row["case"] = (
            f"{row['operation']} {row['setting'] or '-'} {row['rows']}x{row['d']} {row['tokens']} {row['dtype']}"
        )
        found = known.get(run["machine"].get("capability"), {}).get(row["operation"], {}).get(row["setting"], {})
        row["expected"] = found.get("share", 0) if row["provider"] == "ours" else 0
        row["limit"] = found.get("limit")
    return run


def write(value: float | None, form: str) -> str:
    """Write a number; "-" for None."""
    return "-" if value is None else format(value, form)


def remark(row: Row) -> str:
    """Tell why to look at a row first; nothing if there is no reason."""
    reasons = [row["wrong"]] if row["wrong"] else []
    share, expected, speedup = row["share"], row["expected"], row["speedup"]
    if share and share < LOW * expected:
        reasons.append(f"low: {share:.0%} of the roof, {expected:.0%} expected, limit: {row['limit']}")
    if row["provider"] == "ours" and speedup and speedup < 1:
        reasons.append(f"slower: {speedup:.2f} x the speed of another provider")
    return "; ".join(reasons)


def line(row: Row) -> str:
    """Write a row of an operation's table. A wrong result has no time."""
    begin = f"| {row['setting']} | {row['rows']}x{row['d']} | {row['tokens']} | {row['dtype']} | {row['provider']} |"
    if row["wrong"]:
        return f"{begin} **{row['wrong']}** | | | | | |"
    bold, per = "**" * bool(remark(row)), 1e9 * row["seconds"]
    expected = f" of {row['expected']:.0%}" if row["expected"] else ""
    return (
        f"{begin} {1e3 * row['seconds']:,.3f} ({1e3 * row['low']:,.3f}-{1e3 * row['high']:,.3f}) "
        f"| {row['bytes'] / per:,.1f} | {row['flops'] / per:,.1f} | {bold}{write(row['share'], '.0%')}{expected}{bold} "
        f"| {bold}{write(row['speedup'], '.2f')}{bold} | {write(row['error'], '.0e')} |"
    )


def section(run: Run) -> list[str]:
    """Write the machine, a summary, what to look at first, and a table for each operation."""
    rows, machine = run["rows"], run["machine"]
    speedups = [row["speedup"] for row in rows if row["provider"] == "ours" and row["speedup"]]
    faster = sum(speedup >= 1 for speedup in speedups)
    remarks = [f"- {row['case']}, {row['provider']}: {remark(row)}" for row in rows if remark(row)]
    return [
        f"## {machine.get('device')}",
        f"`{run['command']}`",
        ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None),
        "Roofs in GB/s and GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in run["roofs"].items()),
        f"Faster than every other provider in {faster} cases, slower in {len(speedups) - faster}; "
        f"geometric mean of speedups {geometric_mean(speedups) if speedups else float('nan'):.2f}.",
        *["Look at these first:", "\n".join(sorted(remarks, key=lambda text: ": slower" in text))] * bool(remarks),
        *(
            f"### {name}\n{HEAD}" + "\n".join(line(row) for row in rows if row["operation"] == name)
            for name in dict.fromkeys(row["operation"] for row in rows)
        ),
    ]


def comparison(runs: dict[str, Run]) -> list[str]:
    """Compare milliseconds of ours, at the base and now, in all runs; in brackets the speedup over the first one."""
    timed: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        for row in sorted(run["rows"], key=lambda row: row["provider"]):
            if row["provider"] in ("base", "ours") and not row["wrong"]:
                timed.setdefault(f"{name}: {row['provider']}", {})[row["case"]] = 1e3 * row["seconds"]
    if len(timed) < 2:
        return []
    lines = [f"| ms (speedup) | {' | '.join(timed)} |", "| --- " * len(timed) + "| --- |"]
    first, *others = timed.values()
    for case in first:
        if all(case in times for times in others):
            cells = [f"{times[case]:,.3f} ({first[case] / times[case]:.2f})" for times in timed.values()]
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return ["### Comparison", "\n".join(lines)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the report, and plot the runs."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a run, by `python -m bench --json FILE`")
    parser.add_argument("--output", type=Path, help="write the Markdown to this file")
    parser.add_argument("--plot", type=Path, help="plot the runs to this file, by matplotlib")
    arguments = parser.parse_args(argv)
    runs = {}
    for path in arguments.files:
        try:
            runs[str(path)] = read(path)
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"{path}: {error}")
    text = "\n\n".join([part for run in runs.values() for part in section(run)] + comparison(runs))
    if arguments.output:
        arguments.output.write_text(text + "\n", "utf-8")
    else:
        print(text)
    if arguments.plot:
        from plots import plot

        plot([*runs.values()], arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
