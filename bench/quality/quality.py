"""Measure the quality of a pruned model, SmolLM2-135M-Instruct or Gemma 3 270M, for the tables of docs/results.md.

    python bench/quality/quality.py FOLDER CALIBRATION.txt NEAR.txt ...

A cell of the study is a row of ROWS at one sparsity. The script prunes the model for it. Then it evaluates the result
on each NEAR.txt, a text of the calibration text's kind; on the language reference of Python; on far texts (texts.py);
and on tasks made of the far texts (tasks.py). It measures no cell of the results file again, and prunes no checkpoint
again that is in FOLDER: the same command resumes a study, and another version of the code needs a new FOLDER. FOLDER
gets the model, the texts and the checkpoints, 270 MB each. Then `python bench/pages.py` writes the tables.

The far texts have two halves of other documents. Choose settings by `--half choose`, into other --results, and report
results of the other half.
With --curve the rows are those of CURVE: rows of ROWS, recovered on more and more tokens of a mixture of texts.
"""

import argparse
import hashlib
import json
import math
import os
import re
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

# The modules of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from admm import add_admm
from host import REPO, cpu
from models import WHEELS, checkpoint
from tasks import CHANCE, write_tasks
from texts import DOCUMENTS, HALVES, MIXTURE, REFERENCE, SOURCES, write_texts

from sparsefw.checkpoint.files import durably
from sparsefw.report.content import read_report
from sparsefw.report.log import result_rows

RESULTS = REPO / "bench/results/quality.json"

SPARSITIES = ("0.6", "2:4", "0.5", "0.7")
WINDOWS = ["--nsamples", "64", "--seqlen", "256"]
EVALUATION = ["--seqlen", "512", "--eval-windows", "20", "--limit", "300"]

# The flags of each row's run. After "then" there are those of a recovery on a mixture, {mixture} in a run.
ROWS = {
    "magnitude": "--method magnitude",
    "Wanda": "--method wanda",
    "the paper's preset": "--preset paper",
    "Frank-Wolfe": "--method frank-wolfe",
    "SparseGPT": "--method sparsegpt",
    "ADMM": "--method admm",
    "Frank-Wolfe, refitted": "--reconstruct 0 --recover 0",
    "Wanda, reconstructed": "--method wanda --reconstruct 2",
    "SparseGPT, reconstructed": "--method sparsegpt --reconstruct 2",
    "Frank-Wolfe, reconstructed": "--recover 0",
    "the default": "",
}
# Rows at DETAILED only, the sparsity of the table that has a column for each text.
DETAILED = "0.6"
DETAILS = {
    "the fast preset": "--preset fast",
    "the fast preset, recovered": "--preset fast --recover 65536",
    "Frank-Wolfe, refitted and recovered": "--reconstruct 0 --recover 65536",
    "Wanda, reconstructed and recovered": "--method wanda --reconstruct 2 --recover 65536",
    "SparseGPT, reconstructed and recovered": "--method sparsegpt --reconstruct 2 --recover 65536",
    "the default, seed 1": "--seed 1",
    "the default, seed 2": "--seed 2",
    "the default, windows of 512": "--seqlen 512",
    "the default, windows of 1,024": "--seqlen 1024",
    "the default on a mixture": "{mixture}",
    "the default, half of the text the model's own": "--dataset self",
}
# The rows of the curve: a row, and after it a recovery of more and more tokens.
TOKENS = (32_768, 131_072, 524_288, 1_048_576, 2_097_152, 4_194_304)
PREDICTED = (4_194_304, 10_000_000, 100_000_000)
CURVE = {
    f"{start} + {tokens:,}": f"{ROWS[start]} then --recover {tokens}"
    for start, tokens in product(("Frank-Wolfe, reconstructed", "Wanda", "SparseGPT"), TOKENS)
}


def read(path: Path, texts: list[Path]) -> dict[str, dict]:
    """Read the results file, or begin one, and add the hashes of texts.

    Raises:
        SystemExit: the results are of another text of the same name.
    """
    results = json.loads(path.read_bytes()) if path.exists() else {"texts": {}, "cells": {}}
    for text in texts:
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
        if results["texts"].setdefault(text.name, digest) != digest:
            sys.exit(f"{text.name}: the results are of another text of this name; give another --results")
    return results


def pruned(flags: str, sparsity: str, folder: Path, pruning: list[str], mixture: list[str]) -> tuple[str, dict]:
    """Prune, and recover on a mixture.

    Args:
        flags: flags of a row.
        sparsity: the sparsity.
        folder: folder of the outputs. Rows with the same flags share a pruned checkpoint.
        pruning: flags that all runs have.
        mixture: flags of the texts of the mixture.

    Returns:
        The folder of the output, and the part of the cell that tells how it was made.
    """
    run, _, recovery = flags.partition(" then ")
    output, made = folder / re.sub(r"\W+", "-", f"pruned {flags} {sparsity}"), {"commands": {}}
    program = ["-m", "sparsefw.run"]
    if "admm" in flags:
        # The report is read here.
        add_admm()
        program = ["bench/quality/admm.py"]
    of_run = run.format(mixture=" ".join(mixture)).split()
    command = [*program, *pruning, *of_run, "--sparsity", sparsity, "--output", str(output)]
    if recovery:
        start, of_start = pruned(run, sparsity, folder, pruning, mixture)
        made["commands"] |= of_start["commands"]
        command = ["-m", "sparsefw.recover", start, str(output), *pruning[:4], *mixture, *recovery.split()]
    cost = Path(f"{output}.json")
    if not output.exists():
        spend(command, cost)
    made["commands"] |= json.loads(cost.read_bytes())
    report = read_report(output / "report.json")
    *_, (_, figures) = result_rows(report)
    made |= {"machine": {"cpu": cpu(), "device": report.device, **report.versions}, "done": figures[-1]}
    for later in report.recoveries:
        made["machine"] |= later.versions
    layers = report.layers_of(report.method)
    # An error compares with that of Wanda's mask only where a layer approximates its own product, and is written so.
    fitted = {"reconstruction", "recovery"} & set(made["done"].split(", "))
    if not fitted and all(layer.target == "layer" for layer in layers):
        made["error"] = fmean(layer.relative_error for layer in layers)
    return str(output), made


def told(command: list[str]) -> str:
    """Write a command without this machine's folders."""
    return re.sub(r"\S+/", "", " ".join(command))


def spend(command: list[str], cost: Path) -> None:
    """Run a command of Python that resumes. A file gets its CPU seconds, also those before it was killed."""
    earlier, started = json.loads(cost.read_bytes())[told(command)] if cost.exists() else 0.0, children_seconds()
    # If this process is killed as well, nobody knows the seconds.
    cost.write_text(json.dumps({told(command): None}), "utf-8")
    try:
        python(command)
    finally:
        seconds = None if earlier is None else round(earlier + children_seconds() - started, 1)
        cost.write_text(json.dumps({told(command): seconds}), "utf-8")


def python(command: list[str]) -> None:
    """Run a command of Python."""
    subprocess.run([sys.executable, *command], cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, check=True)


def children_seconds() -> float:
    """Return the seconds of CPU cores that all processes have used that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def evaluated(evaluation: dict, model: str, half: str) -> dict:
    """Read the part of a model's cell that evaluation.json holds.

    Returns:
        Perplexities by text and accuracies by task. "ratio" is the geometric mean of far perplexities relative to the
        dense model's. "lost" is the share that tasks lose of the dense model's accuracy above chance, the mean over
        tasks, and its standard error.
    """
    dense = evaluation["against"]
    texts = {Path(text["source"]).stem: text["results"] for text in evaluation["texts"]}
    tasks = {task["task"]: task["results"] for task in evaluation["tasks"] if task["metric"] == "acc"}
    logs = [math.log(by[model]["value"] / by[dense]["value"]) for name, by in texts.items() if name.startswith(half)]
    lost, errors = [], []
    for name, by in tasks.items():
        above = by[dense]["value"] - CHANCE[name.removeprefix(f"{half}_")]
        lost.append((by[dense]["value"] - by[model]["value"]) / above)
        errors.append((by[model]["difference"] or {"stderr": 0})["stderr"] / above)
    return {
        "perplexity": {name: by[model]["value"] for name, by in texts.items()},
        "accuracy": {name: by[model]["value"] for name, by in tasks.items()},
        "ratio": math.exp(fmean(logs)),
        "lost": [fmean(lost), math.hypot(*errors) / len(errors)],
    }


def study(arguments: argparse.Namespace) -> None:
    """Measure the cells that are missing, one sparsity after another: prune for each, and evaluate all together."""
    folder, half = arguments.folder.resolve(), arguments.half
    model = str(checkpoint(arguments.model, folder))
    calibration, *near = (path.resolve() for path in arguments.texts)
    held_out, mixture = write_suite(folder, half, calibration, near)
    texts = [flag for path in held_out for flag in ("--eval", str(path))]
    evaluation = ["--against", model, *texts, "--tasks", half, "--include-path", str(folder / half), *EVALUATION]
    pruning = ["--model", model, "--dataset", str(calibration), *WINDOWS]
    for sparsity in SPARSITIES:
        rows = CURVE if arguments.curve else ROWS | (DETAILS if sparsity == DETAILED else {})
        wanted = {row: f"{row} | {sparsity}" for row in rows}
        known = read(arguments.results, [calibration, *held_out])["cells"]
        made = {
            key: pruned(rows[row], sparsity, folder, pruning, mixture)
            for row, key in wanted.items()
            if key not in known and any(text in key for text in arguments.only)
        }
        if not made:
            continue
        command = ["-m", "sparsefw.evaluate", *(output for output, _ in made.values()), *evaluation]
        with TemporaryDirectory(dir=folder) as written:
            started = children_seconds()
            python([*command, "--output", written])
            seconds = round(children_seconds() - started, 1)
            found = json.loads(Path(written, "evaluation.json").read_bytes())
        # Another study may have written cells by now.
        results = read(arguments.results, [calibration, *held_out])
        results["cells"].setdefault("dense", {"commands": {}, "done": ""} | evaluated(found, model, half))
        for key, (output, how) in made.items():
            results["cells"][key] = how | {"evaluation": {told(command): seconds}} | evaluated(found, output, half)
        # The file is never there in part.
        durably(arguments.results, json.dumps(results, indent=1) + "\n")


def write_suite(folder: Path, half: str, calibration: Path, near: list[Path]) -> tuple[list[Path], list[str]]:
    """Write the texts and tasks that are missing in the folder.

    Args:
        folder, half: folder of the study, and half of the far texts.
        calibration, near: the calibration text, and texts of its kind to evaluate on.

    Returns:
        All texts to evaluate on, and the flags of the texts of the mixture.
    """
    suite = folder / half
    if not suite.exists():
        sources = [REFERENCE, *(source for source in SOURCES if source.name.startswith(half))]
        documents = write_texts(suite, sources, [calibration])
        # In comments of code there is English, too.
        prose = [name for name in documents if name.startswith(half) and "code" not in name]
        write_tasks(suite, half, [document for name in prose for document in documents[name]])
    held_out = [*near, *sorted(suite.glob("*.txt"))]
    if not (folder / "mixture").exists():
        write_texts(folder / "mixture", MIXTURE, [calibration, *held_out], DOCUMENTS)
    mixed = [flag for source in MIXTURE for flag in ("--dataset", str(folder / f"mixture/{source.name}.txt"))]
    return held_out, mixed


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="folder for the model, texts and outputs")
    add("texts", type=Path, nargs="+", metavar="TEXT.txt", help="calibration text, then texts of its kind")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="default: bench/results/quality.json")
    add("--only", nargs="+", default=[""], metavar="TEXT", help="measure cells with this in their name: 'Wanda | 0.6'")
    add("--half", choices=HALVES, default="report", help="half of the far texts (default: report)")
    add("--curve", action="store_true", help="measure the rows of CURVE")
    add("--model", choices=WHEELS, default="smollm2", help="another one needs other --results and FOLDER")
    study(parser.parse_intermixed_args())


if __name__ == "__main__":
    main()
