"""Measure what pruning costs on tasks: `python bench/evaluation/study.py MODEL CALIBRATION.txt TASKS --work DIR`.

TASKS is a folder of make_tasks.py. Every checkpoint (method, sparsity) is pruned by one run of the product on
CALIBRATION.txt and evaluated by one of entrant.py, each in a process of its own. DIR keeps the checkpoints and the
answers; what is there is not made again, so an interrupted study goes on. The table has standard errors, and paired
differences from the dense model with theirs: all models have answered the same items.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsefw.evaluation.metrics import Estimate, mean, perplexity, weighted_perplexity
from sparsefw.report import read_report

RESULTS = Path(__file__).parents[1] / "results" / "evaluation-smollm2.json"

DENSE = "dense"
METHODS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "sparsefw": "the default"}
# The last rows of the table compare these.
OURS, STRONGEST = "sparsefw", "sparsegpt"

# Task and metric of each column, and what computes the metric from the values of items.
COLUMNS = {
    ("next_sentence", "acc_norm"): mean,
    ("word_choice", "acc"): mean,
    ("true_sentence", "acc"): mean,
    ("word_cloze", "acc"): mean,
    ("word_cloze", "perplexity"): perplexity,
    ("docs_rolling", "word_perplexity"): weighted_perplexity,
}

# Texts have something in common if they share so many words in a row.
RUN = 13


@dataclass(frozen=True)
class Study:
    """The settings that all models of a study share."""

    model: Path
    calibration: Path
    tasks: Path
    work: Path
    nsamples: int
    seqlen: int

    def header(self) -> dict:
        """Its settings in the results: names without folders, the texts by their hashes."""
        return {
            "model": self.model.name,
            "calibration": {self.calibration.name: hashlib.sha256(self.calibration.read_bytes()).hexdigest()},
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "tasks": json.loads((self.tasks / "sources.json").read_text(encoding="utf-8")),
        }


@dataclass(frozen=True)
class Pruned:
    """A checkpoint of the study; dense without a method."""

    method: str = DENSE
    sparsity: str = ""

    @property
    def key(self) -> str:
        """Its name in the folder and in the results."""
        return f"{self.method}-{self.sparsity}" if self.sparsity else self.method

    @property
    def row(self) -> str:
        """Its name in the table."""
        return f"{METHODS[self.method]}, {float(self.sparsity):.0%}" if self.sparsity else self.method


def prune(pruned: Pruned, study: Study) -> Path:
    """The folder of a checkpoint, which is made if it is not there.

    Raises:
        SystemExit: the run failed, or another run has made what is there.
    """
    if not pruned.sparsity:
        return study.model
    folder = study.work / pruned.key
    if not folder.exists():
        flags = ["--model", study.model, "--dataset", study.calibration, "--nsamples", study.nsamples]
        flags += [
            "--seqlen",
            study.seqlen,
            "--sparsity",
            pruned.sparsity,
            "--method",
            pruned.method,
            "--output",
            folder,
        ]
        _run([sys.executable, "-m", "sparsefw.run", *flags], pruned.key)
    made_with = read_report(folder / "report.json").arguments
    wanted = {"method": pruned.method, "sparsity": pruned.sparsity, "nsamples": study.nsamples, "seqlen": study.seqlen}
    if different := [name for name, value in wanted.items() if made_with[name] != value]:
        raise SystemExit(f"{folder}: made with {different[0]} {made_with[different[0]]}, not {wanted[different[0]]}")
    return folder


def evaluate(pruned: Pruned, folder: Path, study: Study) -> dict:
    """The answers of a checkpoint to these tasks, by task."""
    tasks_hash = hashlib.sha256((study.tasks / "sources.json").read_bytes()).hexdigest()
    kept = study.work / f"{pruned.key}-{tasks_hash[:8]}.json"
    if not kept.exists():
        partial = kept.with_suffix(".partial")
        entrant = Path(__file__).with_name("entrant.py")
        _run([sys.executable, entrant, "streamed", folder, study.tasks.resolve(), partial], pruned.key)
        # Last, so that a file is there only once it is complete.
        partial.rename(kept)
    return json.loads(kept.read_text(encoding="utf-8"))["tasks"]


def _run(command: Sequence[object], name: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    process = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name}: exit status {process.returncode}\n{process.stderr[-4000:]}")


def estimates(tasks: dict) -> dict[tuple[str, str], Estimate]:
    """The columns of a model, from its answers."""
    return {(task, metric): formula(tasks[task]["metrics"][metric]) for (task, metric), formula in COLUMNS.items()}


def entry(tasks: dict, dense: dict) -> dict:
    """The entry of a model in the results: values and differences from the dense one, with standard errors."""
    found, differences = estimates(tasks), differences_of(tasks, dense)
    return {
        f"{task} {metric}": {
            "value": found[task, metric].value,
            "stderr": found[task, metric].stderr,
            "difference": differences[f"{task} {metric}"],
            "harness": tasks[task]["results"][metric],
        }
        for task, metric in COLUMNS
    }


def differences_of(tasks: dict, other: dict) -> dict[str, list[float]]:
    """By column, the paired difference of a model from another, and its standard error."""
    found, of_other = estimates(tasks), estimates(other)
    pairs = {column: found[column].minus(of_other[column]) for column in COLUMNS}
    return {f"{task} {metric}": list(vars(pair).values()) for (task, metric), pair in pairs.items()}


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


def table(results: dict) -> str:
    """Markdown: values with standard errors, in brackets differences from the dense model; those of two methods."""
    names = [f"{task} {metric}" for task, metric in COLUMNS]
    lines = [f"| {' | '.join(['', *names])} |", f"|{'---|' * (len(names) + 1)}"]
    for row, of_model in results["models"].items():
        cells = [_numbers(name, of_model[name]["value"], of_model[name]["stderr"]) for name in names]
        if row != DENSE:
            changes = [_numbers(name, *of_model[name]["difference"], sign="+") for name in names]
            cells = [f"{cell} ({change})" for cell, change in zip(cells, changes, strict=True)]
        lines.append(f"| {' | '.join([row, *cells])} |")
    for row, of_pair in results["pairs"].items():
        lines.append(f"| {' | '.join([row, *(_numbers(name, *of_pair[name], sign='+') for name in names)])} |")
    return "\n".join(lines)


def _numbers(name: str, value: float, stderr: float, sign: str = "") -> str:
    """A value with its standard error; accuracies in per cent."""
    scale, digits = (1, 2) if "perplexity" in name else (100, 1)
    return f"{scale * value:{sign}.{digits}f} ± {scale * stderr:.{digits}f}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="the dense checkpoint")
    parser.add_argument("calibration", type=Path, nargs="?", metavar="CALIBRATION.txt", help="text to calibrate on")
    parser.add_argument("tasks", type=Path, nargs="?", help="folder of the tasks")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps checkpoints and answers")
    sparsities = {"type": lambda text: text.split(","), "default": "0.6", "metavar": "P,P"}
    parser.add_argument("--sparsities", **sparsities, help="(default: 0.6)")
    parser.add_argument("--nsamples", type=int, default=64, help="(default: 64)")
    parser.add_argument("--seqlen", type=int, default=512, help="(default: 512)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"(default: bench/results/{RESULTS.name})")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is in the results")
    arguments = parser.parse_args(argv)
    if not arguments.table and None in (arguments.tasks, arguments.work):
        parser.error("MODEL, CALIBRATION.txt, TASKS and --work are needed")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Prune and evaluate what is missing, and print the table."""
    arguments = _parse(argv)
    if arguments.table:
        print(table(json.loads(arguments.results.read_text(encoding="utf-8"))))
        return
    study = Study(*(getattr(arguments, name) for name in Study.__dataclass_fields__))
    if shared := next(shared_runs(study.tasks, study.calibration.read_text(encoding="utf-8")), None):
        raise SystemExit(f"{study.calibration}: has words of the tasks in it: {shared}")
    study.work.mkdir(parents=True, exist_ok=True)
    results: dict = {"study": study.header(), "models": {}, "pairs": {}}
    answers: dict[Pruned, dict] = {}
    for pruned in (Pruned(), *(Pruned(method, of) for of in arguments.sparsities for method in METHODS)):
        answers[pruned] = evaluate(pruned, prune(pruned, study), study)
        results["models"][pruned.row] = entry(answers[pruned], answers[Pruned()])
        strongest = Pruned(STRONGEST, pruned.sparsity)
        if pruned.method == OURS:
            name = f"{METHODS[OURS]} - {strongest.row}"
            results["pairs"][name] = differences_of(answers[pruned], answers[strongest])
        arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{pruned.row}: done", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
