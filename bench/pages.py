"""Write what pages have of results files into README.md and docs/: `python bench/pages.py`.

A page has `<!-- NAME -->` before such a part, and `<!-- end -->` after it. NAME is a key of PARTS.
"""

import json
import re
import sys
from contextlib import chdir, redirect_stdout
from functools import cache, partial
from io import StringIO
from typing import Any

from host import REPO

# The package of this checkout, and the modules of bench/quality/, which lead to those of bench/.
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(REPO / "bench/quality"))

import expected
import quality
import report
import tables

import sparsefw.plan
from bench.__main__ import catalogue

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def results(name: str) -> dict[str, Any]:
    """Read a results file."""
    return json.loads((REPO / f"bench/results/{name}.json").read_text("utf-8"))


def timed(name: str) -> str:
    """Write the command, the machine and the summary of a run of `python -m bench`."""
    run = results(name)
    return f"`{run['command']}`\n\n{report.heading(run)}\n\n{report.summary(run['rows'])}\n"


LARGE = ["--model", "bench/configs/Meta-Llama-3-70B.json"]
PLANS = [
    "--gpu rtx4090",
    "--gpu rtx4090 --gpu-memory 14.4 --host-memory 48 --reconstruct 0",
    "--gpu h100 --gpu-memory 24 --host-memory 64",
    "--gpu h100",
]


@cache
def planned(flags: str) -> str:
    """Return the peaks of memory in the plan of a large model, as the command prints them."""
    with redirect_stdout(StringIO()) as printed, chdir(REPO):
        sparsefw.plan.main([*LARGE, *flags.split()])
    return printed.getvalue().partition("\n\ndevice")[0]


def plan() -> str:
    """Write the first one of PLANS."""
    return f"```\n$ python -m sparsefw.plan {' '.join(LARGE)} {PLANS[0]}\n{planned(PLANS[0])}\n...\n```\n"


def plans() -> str:
    """Write the peak of all phases of PLANS, in GiB."""
    peaks = (re.findall(r"^all +(.+?) +(.+)$", planned(flags), re.MULTILINE) for flags in PLANS)
    return report.plain(
        [["flags", "GPU", "host"], *([f"`{flags}`", *peak] for flags, (peak,) in zip(PLANS, peaks, strict=True))]
    )


def generated(name: str) -> str:
    """Write the command, the machine and the rows of a run of bench/runs/packed.py."""
    run = results(name)
    rows = [[path, f"{row['gb']:.2f}", f"{row['rate']:.2f}"] for path, row in run["rows"].items()]
    table = report.plain([["checkpoint", "GB of the process", "tokens a second"], *rows])
    return f"`{run['command']}` by commit {run['commit']}, {run['cpu']}:\n\n{table}"


CELLS = results("quality")["cells"]
PARTS = {
    "first run": lambda: "```\n" + "\n".join(results("first-run")["table"]) + "\n```\n",
    "compared": partial(tables.table, CELLS, rows=quality.ROWS),
    **{f"quality at {sparsity}": partial(tables.table, CELLS, sparsity) for sparsity in quality.SPARSITIES},
    "gemma3": partial(tables.table, results("quality-gemma3")["cells"]),
    "every text": partial(tables.by_text, CELLS),
    "curve": partial(tables.curve, CELLS),
    "predictions": partial(tables.predictions, CELLS),
    "plan": plan,
    "plans": plans,
    "text in memory": partial(generated, "text-in-memory"),
    "text from the disk": partial(generated, "text-from-disk"),
    "operations": lambda: f"{catalogue()}\n",
    "expected": lambda: f"{expected.table()}\n",
    "timed cpu": partial(timed, "cpu"),
    "timed packed": partial(timed, "packed"),
}


def written(page: str) -> str:
    """Write all parts of a page anew.

    Raises:
        KeyError: there is no part of this name.
    """
    return re.sub(
        r"<!-- (.+) -->\n(?s:.*?)<!-- end -->",
        lambda part: f"<!-- {part[1]} -->\n{PARTS[part[1]]()}<!-- end -->",
        page,
    )


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text("utf-8")), "utf-8")
