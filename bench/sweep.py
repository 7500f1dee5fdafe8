"""Tell which models work: `python bench/sweep.py [NAME ...]` tries every class of transformers that generates text.

A class gets a tiny random checkpoint. It is pruned by `sparsefw.run`, checked by `sparsefw.verify`, loaded by plain
transformers and compared with it. Each class is one row of the results file, which is written after each class. A row
in the file is not made again unless it is named, so the same command resumes a sweep. With --write-docs the results
become docs/models.md.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from host import REPO

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(REPO))

import psutil
import torch
import transformers
from classes.examine import NOT_RUN, OUTCOMES, TRACEBACK, WORKS, examine
from classes.table import page
from classes.tiny_model import Case, cases

# Children take the modules that are imported here from their parent. Importing takes longer than examining a class.
import sparsefw.driver.run
from sparsefw.checkpoint.files import durably

RESULTS, PAGE = REPO / "bench/results/sweep.json", REPO / "docs/models.md"
# Name in the folder of a class.
ROW = "row.json"
# Limits of one class: seconds of wall time, and GiB of addresses beyond those of the imports, mapped files included.
SECONDS, MEMORY = 180, 16


def examine_in_process(case: Case) -> dict[str, Any]:
    """Make the row of a class, whatever happens to the process."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        # A copy of this process, which multiplies nothing itself.
        process = multiprocessing.get_context("fork").Process(target=_child, args=(case, Path(folder)))
        process.start()
        process.join()
        if (made := Path(folder, ROW)).exists():
            row = json.loads(made.read_text())
        else:
            code = process.exitcode or 0
            end = signal.Signals(-code).name if code < 0 else f"status {code}"
            why = f"took more than {SECONDS} s" if end == "SIGALRM" else f"the process ended with {end}"
            row = case.row | {"outcome": TRACEBACK, "reason": why}
    return row | {"seconds": round(time.monotonic() - started, 1)}


def _child(case: Case, folder: Path) -> None:
    # The system ends this process if it is still there.
    signal.alarm(SECONDS)
    # Libraries print much.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    allowed = psutil.Process().memory_info().vms + MEMORY * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    torch.set_num_threads(1)
    (folder / ROW).write_text(json.dumps(examine(case, folder)))


def main() -> int:
    """Examine classes. Returns 0 if all that were examined work or are not run by transformers itself, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="model type or class; * stands for any text (default: without a row)")
    add("--jobs", type=int, default=1, metavar="N", help="classes at a time, each in one process (default: 1)")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="results (default: bench/results/sweep.json)")
    add("--write-docs", action="store_true", help="examine nothing; write docs/models.md")
    arguments = parser.parse_args()
    path, names = arguments.json, arguments.names
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
    chosen = [case for case in cases() if not names and case.key not in results["rows"]]
    chosen += [c for c in cases() if any(fnmatch(c.model_type, n) or fnmatch(c.class_name, n) for n in names)]
    if names and not chosen:
        sys.exit(f"{', '.join(names)}: not in transformers {transformers.__version__}")
    print(f"sparsefw of {next(iter(sparsefw.__path__))}, {len(chosen)} classes", flush=True)
    counts = Counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for case, row in zip(chosen, pool.map(examine_in_process, chosen), strict=True):
            results["rows"][case.key] = row
            # A reader never sees half of the file.
            durably(path, json.dumps(results, indent=1, sort_keys=True) + "\n")
            counts[row["outcome"]] += 1
            why = f": {row['reason']}" if row["reason"] else ""
            print(f"{row['outcome']:9} {case.key}: {row['seconds']} s{why}", flush=True)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]))
    return int(not counts.keys() <= {WORKS, NOT_RUN})


if __name__ == "__main__":
    sys.exit(main())
