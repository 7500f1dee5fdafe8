"""Examine a class in a process of its own, with limits of memory and time, so that a crash ends no other one."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# Children take the modules that are imported here from their parent. Importing takes longer than examining a class.
import sparsefw.driver.run  # noqa: F401
from classes.examine import TRACEBACK, examine
from classes.tiny_model import Case

# Processes that examine a class begin as copies of this one, which multiplies nothing itself.
FORK = multiprocessing.get_context("fork")

# Limits of one class: seconds of wall time, and GiB of memory beyond that of the imports.
SECONDS, MEMORY = 180, 4


def examine_in_process(case: Case) -> dict[str, Any]:
    """Make the row of a class, whatever happens to the process."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        row_file, output = Path(folder, "row.json"), Path(folder, "output.txt")
        process = FORK.Process(target=_child, args=(case, Path(folder), output, row_file))
        process.start()
        process.join()
        if row_file.exists():
            row = json.loads(row_file.read_text())
        else:
            code = process.exitcode or 0
            end = signal.Signals(-code).name if code < 0 else f"status {code}"
            why = f"took more than {SECONDS} s" if end == "SIGALRM" else f"the process ended with {end}"
            last = output.read_text(errors="replace").splitlines()[-1:] if output.exists() else []
            row = case.row | {"outcome": TRACEBACK, "reason": ": ".join([why, *last])}
    return row | {"seconds": round(time.monotonic() - started, 1)}


def _child(case: Case, folder: Path, output: Path, row_file: Path) -> None:
    # The system ends this process if it is still there.
    signal.alarm(SECONDS)
    # Libraries print much. Only the last line of a crash is of interest.
    sys.stdout = sys.stderr = output.open("w")
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MEMORY * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    torch.set_num_threads(1)
    row_file.write_text(json.dumps(examine(case, folder)))
