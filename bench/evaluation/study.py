"""Measure what pruning costs on tasks: `python bench/evaluation/study.py MODEL CALIBRATION.txt TASKS --work DIR`.

TASKS is a folder of make_tasks.py. Every checkpoint (method, sparsity) is pruned by one run of the product on
CALIBRATION.txt; DIR keeps them, and what is there is not made again. Then `sparsefw.evaluate` compares all of them
with the dense model, the same items in pairs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsefw.report import read_report

METHODS = ("wanda", "sparsegpt", "sparsefw")
TAG = "prose"

# Texts have something in common if they share this many words in a row.
RUN = 13


@dataclass(frozen=True)
class Study:
    """The settings that all checkpoints of a study share."""

    model: Path
    calibration: Path
    tasks: Path
    work: Path
    nsamples: int
    seqlen: int


def prune(study: Study, method: str, sparsity: str) -> Path:
    """The folder of a checkpoint, which is made if it is not there.

    Raises:
        SystemExit: the run failed, or another run has made what is there.
    """
    folder = study.work / f"{method}-{sparsity}"
    wanted = {"method": method, "sparsity": sparsity, "nsamples": study.nsamples, "seqlen": study.seqlen}
    if not folder.exists():
        flags = [text for name, value in wanted.items() for text in (f"--{name}", value)]
        _run("sparsefw.run", "--model", study.model, "--dataset", study.calibration, "--output", folder, *flags)
    made_with = read_report(folder / "report.json").arguments
    if different := [name for name, value in wanted.items() if made_with[name] != value]:
        raise SystemExit(f"{folder}: made with {different[0]} {made_with[different[0]]}, not {wanted[different[0]]}")
    return folder


def _run(*command: object) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", *map(str, command)], env=environment, check=True)


def shared_runs(tasks: Path, calibration: str) -> Iterator[str]:
    """Runs of words that texts of the tasks and the calibration text have in common."""
    known = set(_runs(calibration))
    for file in sorted(tasks.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            texts = [item.get(name, "") for name in ("context", "text")] + item.get("choices", [])
            yield from (f"{file.name}: {run}" for text in texts for run in _runs(text) if run in known)


def _runs(text: str) -> Iterator[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return (" ".join(words[n : n + RUN]) for n in range(len(words) - RUN + 1))


def main(argv: list[str] | None = None) -> None:
    """Prune what is missing, and evaluate all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the dense checkpoint")
    parser.add_argument("calibration", type=Path, metavar="CALIBRATION.txt", help="text to calibrate on")
    parser.add_argument("tasks", type=Path, help="folder of the tasks")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps checkpoints, gets the results")
    parser.add_argument("--sparsities", default="0.6", metavar="P,P", help="(default: 0.6)")
    parser.add_argument("--nsamples", type=int, default=64, help="(default: 64)")
    parser.add_argument("--seqlen", type=int, default=512, help="(default: 512)")
    arguments = vars(parser.parse_args(argv))
    sparsities = arguments.pop("sparsities").split(",")
    study = Study(**arguments)
    if shared := next(shared_runs(study.tasks, study.calibration.read_text(encoding="utf-8")), None):
        raise SystemExit(f"{study.calibration}: has words of the tasks in it: {shared}")
    study.work.mkdir(parents=True, exist_ok=True)
    folders = [prune(study, method, sparsity) for sparsity in sparsities for method in METHODS]
    compared = ["--against", study.model, "--tasks", TAG, "--include-path", study.tasks.resolve()]
    _run("sparsefw.evaluate", *folders, *compared, "--output", study.work, "--overwrite")


if __name__ == "__main__":
    main()
