"""Tell which models work: `python bench/sweep.py [NAME ...]` tries every class of transformers that generates text.

A class gets a tiny random checkpoint. It is pruned by `sparsefw.run`, checked by `sparsefw.verify`, loaded by plain
transformers and compared with it. Each class is one row of the results file, which is written as rows come. A row in
the file is not made again unless it is named, so the same command resumes a sweep. With --write-docs the results become
docs/models.md.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from classes.examine import NOT_RUN, OUTCOMES, WORKS
from classes.process import examine_in_process
from classes.table import page
from classes.tiny_model import Case, cases

import sparsefw

REPO = Path(__file__).resolve().parents[1]
RESULTS, PAGE = REPO / "bench" / "results" / "sweep.json", REPO / "docs" / "models.md"


def select(names: Sequence[str], rows: dict[str, Any], again: bool) -> list[Case]:
    """Select the classes to examine.

    Args:
        names: model types or classes, `*` stands for any text; without names, the classes that have no row.
        rows: rows of the results, by key.
        again: whether the classes whose row does not say that they work are examined again.
    """
    known = list(cases())
    if not names:
        return [c for c in known if c.key not in rows or (again and rows[c.key]["outcome"] != WORKS)]
    chosen = [c for c in known if any(fnmatch(c.model_type, n) or fnmatch(c.class_name, n) for n in names)]
    if not chosen:
        near = get_close_matches(names[0], {name for c in known for name in (c.model_type, c.class_name)})
        wanted, found = ", ".join(names), ", ".join(near) or "-"
        sys.exit(f"{wanted}: not in transformers {transformers.__version__}; nearest: {found}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Examine classes. Returns 0 if all that were examined work or are not run by transformers itself, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="model type or class; * stands for any text (default: all)")
    add("--jobs", type=int, default=1, metavar="N", help="classes at a time, each in one process (default: 1)")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="results (default: bench/results/sweep.json)")
    add("--again", action="store_true", help="examine the classes again that do not work in the results")
    add("--write-docs", action="store_true", help="examine nothing; write docs/models.md")
    arguments = parser.parse_args(argv)
    path = arguments.json
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    results = json.loads(path.read_text()) if path.exists() else {"versions": versions, "rows": {}}
    if results["versions"] | versions != results["versions"]:
        sys.exit(f"{path}: made with {results['versions']}; give another file, or remove it")
    if arguments.write_docs:
        PAGE.write_text(page(results))
        return 0
    # Some models of images are timm's.
    timm = version("timm") if find_spec("timm") else "not installed"
    results["versions"] |= {"sparsefw": sparsefw.__version__, "timm": timm}
    chosen = select(arguments.names, results["rows"], arguments.again)
    print(f"sparsefw of {next(iter(sparsefw.__path__))}, {len(chosen)} classes", flush=True)
    counts = Counter[str]()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        keys = {pool.submit(examine_in_process, case): case.key for case in chosen}
        for future in as_completed(keys):
            key, row = keys[future], future.result()
            results["rows"][key] = row
            # A reader never sees half of the file.
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            partial.replace(path)
            counts[row["outcome"]] += 1
            print(f"{row['outcome']:9} {key}: {row['seconds']} s{row['reason'] and ': '}{row['reason']}", flush=True)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]))
    return int(not counts.keys() <= {WORKS, NOT_RUN})


if __name__ == "__main__":
    sys.exit(main())
