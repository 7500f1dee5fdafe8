"""Report saved runs of `python -m bench` in Markdown.

First comes what to look at: wrong results, cases far below the expected share of the roof, and cases in which another
provider is faster. Runs of several files are compared at the end.
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
| setting | shape | tokens | dtype | provider | ms (20-80 %) | bytes | flops | of the roof | speedup | error |
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
        found = known.get(run["machine"].get("capability"), {}).get(row["operation"], {}).get(row["setting"], 0)
        found = found if isinstance(found, dict) else {"share": found}
        limit = f", {found['limit']}" if found.get("limit") else ""
        row |= {"expected": found["share"] * (row["provider"] == "ours"), "limit": limit}
    return run


def number(value: float | None) -> str:
    """Write three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def rate(each_second: float, unit: str) -> str:
    """Write a rate with the prefix G or T."""
    scale, prefix = (1e12, "T") if each_second >= 1e12 else (1e9, "G")
    return f"{number(each_second / scale)} {prefix}{unit}/s"


def share(row: Row) -> str:
    """Write the share of the roof, and the expected one."""
    reached = "" if row["share"] is None else f"{row['share']:.1%}"
    return f"{reached} (expected {row['expected']:.0%}{row['limit']})" if row["expected"] else reached


def remark(row: Row) -> str:
    """Tell why to look at a row first; nothing if there is no reason."""
    if row["wrong"]:
        return row["wrong"]
    if row["share"] is not None and row["share"] < LOW * row["expected"]:
        return f"low: {share(row)} of the roof"
    if row["provider"] == "ours" and (row["speedup"] or 1) < 1:
        return f"slower: {number(row['speedup'])} x the speed of another provider"
    return ""


def line(row: Row) -> str:
    """Write a row of an operation's table. A wrong result has no time."""
    begin = f"| {row['setting']} | {row['rows']}x{row['d']} | {row['tokens']} | {row['dtype']} | {row['provider']} |"
    if row["wrong"]:
        return f"{begin} **{row['wrong']}** | | | | | |"
    median, low, high = (number(1e3 * row[key]) for key in ("seconds", "low", "high"))
    moved, computed = rate(row["bytes"] / row["seconds"], "B"), rate(row["flops"] / row["seconds"], "FLOP")
    bold = "**" if remark(row) else ""
    end = f"{bold}{share(row)}{bold} | {bold}{number(row['speedup'])}{bold} | {number(row['error'])} |"
    return f"{begin} {median} ({low}-{high}) | {moved} | {computed} | {end}"


def section(run: Run) -> list[str]:
    """Write the machine, a summary, what to look at first, and a table for each operation."""
    rows, machine = run["rows"], run["machine"]
    speedups = [row["speedup"] for row in rows if row["provider"] == "ours" and row["speedup"]]
    faster = sum(speedup >= 1 for speedup in speedups)
    remarks = [f"- {row['case']}, {row['provider']}: {remark(row)}" for row in rows if remark(row)]
    remarks.sort(key=lambda text: ": slower: " in text)
    roofs = [f"{name} {rate(value, 'B' if name == 'copy' else 'FLOP')}" for name, value in run["roofs"].items()]
    made = [
        f"## {machine.get('device')}",
        f"`{run['command']}`",
        ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None),
        f"Roofs: {', '.join(roofs)}",
        f"Faster than every other provider in {faster} cases, slower in {len(speedups) - faster}; "
        f"geometric mean of speedups {number(geometric_mean(speedups or [1]))}.",
        "\n".join(["Look at these first:\n", *remarks] if remarks else ["Nothing is wrong, low or slower."]),
    ]
    for name in dict.fromkeys(row["operation"] for row in rows):
        made.append(f"### {name}\n{HEAD}" + "\n".join(line(row) for row in rows if row["operation"] == name))
    return made


def comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Compare the milliseconds of ours in several runs; in brackets the speedup over the first one."""
    timed = [
        {row["case"]: 1e3 * row["seconds"] for row in run["rows"] if row["provider"] == "ours" and not row["wrong"]}
        for run in runs
    ]
    lines = [["ms (speedup)", *names], ["---"] * (1 + len(names))]
    for case, first in timed[0].items():
        if all(case in times for times in timed):
            lines.append([case, *(f"{number(times[case])} ({number(first / times[case])})" for times in timed)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the report, and plot the runs."""
    parser = argparse.ArgumentParser("python -m bench report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a run, by `python -m bench --json FILE`")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the Markdown there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the runs, with matplotlib")
    arguments = parser.parse_args(argv)
    runs = []
    for path in arguments.files:
        try:
            runs.append(read(path))
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"{path}: {error}")
    parts = [part for run in runs for part in section(run)]
    if len(runs) > 1:
        parts.append(comparison(runs, [*map(str, arguments.files)]))
    text = "\n\n".join(parts)
    if arguments.output:
        arguments.output.write_text(text + "\n", "utf-8")
    else:
        print(text)
    if arguments.plot:
        from plots import plot

        plot(runs, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
