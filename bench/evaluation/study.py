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
from itertools import product
from pathlib import Path

METHODS = ("wanda", "sparsegpt", "sparsefw")
TAG = "prose"

# Texts have something in common if they share this many words in a row.
RUN = 13


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
    add = parser.add_argument
    add("model", type=Path, help="the dense checkpoint")
    add("calibration", type=Path, metavar="CALIBRATION.txt", help="text to calibrate on")
    add("tasks", type=Path, help="folder of the tasks")
    add("--work", type=Path, required=True, metavar="DIR", help="keeps checkpoints, gets the results")
    add("--sparsities", default="0.6", metavar="P,P", help="(default: 0.6)")
    add("--nsamples", type=int, default=64, help="(default: 64)")
    add("--seqlen", type=int, default=512, help="(default: 512)")
    arguments = parser.parse_args(argv)
    calibration, tasks, work = arguments.calibration, arguments.tasks, arguments.work
    if shared := next(shared_runs(tasks, calibration.read_text(encoding="utf-8")), None):
        raise SystemExit(f"{calibration}: has words of the tasks in it: {shared}")
    work.mkdir(parents=True, exist_ok=True)
    folders = []
    for sparsity, method in product(arguments.sparsities.split(","), METHODS):
        folder = work / f"{method}-{sparsity}-{arguments.nsamples}x{arguments.seqlen}"
        flags = ["--method", method, "--sparsity", sparsity, "--dataset", calibration]
        flags += ["--nsamples", arguments.nsamples, "--seqlen", arguments.seqlen]
        if not folder.exists():
            _run("sparsefw.run", "--model", arguments.model, "--output", folder, *flags)
        folders.append(folder)
    compared = ["--against", arguments.model, "--tasks", TAG, "--include-path", tasks.resolve()]
    _run("sparsefw.evaluate", *folders, *compared, "--output", work, "--overwrite")


if __name__ == "__main__":
    main()
