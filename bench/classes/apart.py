"""Examine each class in a process of its own, with limits of memory and time, so that a crash ends no other one."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# Children take what is imported here from their parent: to import it takes longer than to examine a class.
import sparsefw.driver  # noqa: F401
from classes.examine import TRACEBACK, examine
from classes.tiny_model import Case

# Processes that examine a class begin as copies of this one. It starts no threads and does no products itself.
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Limits:
    """What one class may take: seconds of wall time, and GiB of memory beyond what the imports take."""

    seconds: float = 180.0
    memory: float = 4.0


@dataclass
class Running:
    """A class that is being examined.

    Attributes:
        case: the class.
        process: its process.
        folder: its temporary folder.
        began: `time.monotonic` of its start.
    """

    case: Case
    process: BaseProcess
    folder: tempfile.TemporaryDirectory
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall time since its start."""
        return time.monotonic() - self.began


# Examines a class in an empty folder, and returns its row.
Examine = Callable[[Case, Path], dict[str, Any]]


def examine_all(
    cases: Iterable[Case],
    jobs: int,
    limits: Limits,
    on_row: Callable[[Case, dict[str, Any]], None],
    how: Examine = examine,
) -> None:
    """Examine classes, several at a time.

    Args:
        cases: the classes.
        jobs: number of processes, with one thread each.
        limits: limits of each process.
        on_row: called with each class's row of the results as soon as it is there.
        how: examines a class.
    """
    waiting, running = deque(cases), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.popleft(), limits, how))
            wait([one.process.sentinel for one in running], timeout=1)
            for one in running[:]:
                if one.process.is_alive() and one.seconds < limits.seconds:
                    continue
                running.remove(one)
                on_row(one.case, _end(one, limits))
    finally:
        for one in running:
            one.process.kill()
            one.process.join()
            one.folder.cleanup()


def _start(case: Case, limits: Limits, how: Examine) -> Running:
    folder = tempfile.TemporaryDirectory(prefix="sweep-")
    process = FORK.Process(target=_child, args=(case, Path(folder.name), limits, how))
    process.start()
    return Running(case, process, folder)


def _child(case: Case, folder: Path, limits: Limits, how: Examine) -> None:
    """Examine a class in this process, and leave its row in the folder."""
    # Libraries print much. Only the last words of a crash are of interest.
    sys.stdout = sys.stderr = (folder / "said.txt").open("w")
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + int(limits.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    torch.set_num_threads(1)
    row = how(case, folder)
    (folder / "row.json").write_text(json.dumps(row))


def _end(one: Running, limits: Limits) -> dict[str, Any]:
    """The row of a process that has ended or has no more time."""
    overdue = one.process.is_alive()
    if overdue:
        one.process.kill()
    one.process.join()
    folder = Path(one.folder.name)
    if (folder / "row.json").exists():
        row = json.loads((folder / "row.json").read_text())
    else:
        said = (folder / "said.txt").read_text(errors="replace").splitlines() if (folder / "said.txt").exists() else []
        code = one.process.exitcode or 0
        end = signal.Signals(-code).name if code < 0 else f"status {code}"
        why = f"took more than {limits.seconds:g} s" if overdue else f"the process ended with {end}"
        row = {"model_type": one.case.model_type, "class": one.case.class_name, "kind": one.case.kind}
        row |= {"outcome": TRACEBACK, "reason": ": ".join([why, *said[-1:]])}
    one.folder.cleanup()
    return row | {"seconds": round(one.seconds, 1)}
