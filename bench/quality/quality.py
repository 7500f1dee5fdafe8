"""Measure the quality of pruned SmolLM2-135M-Instruct, and print tables of it.

    python bench/quality/quality.py FOLDER CALIBRATION.txt NEAR.txt ...
    python bench/quality/quality.py --table

A cell of the study is a row of ROWS at one sparsity. The script prunes the model for it. Then it evaluates the result
on each NEAR.txt, a text of the calibration text's kind; on the language reference of Python; on far texts (texts.py);
and on tasks made of the far texts (tasks.py). It adds a cell to the results file as soon as the cell is known, and does
not measure a cell of the file again: the same command resumes a study. FOLDER gets the model, the texts and the pruned
checkpoints, 270 MB each. A checkpoint there is not pruned again, so another version of the code needs a new FOLDER.

The far texts have two halves of other documents. Choose settings by `--half choose`, into other --results, and report
results of the other half.
With --tiny the built-in model is pruned in seconds, and nothing is downloaded.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

# The modules of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host import REPO, commit, cpu
from report import plain
from smollm2 import build_checkpoint
from tasks import CHANCE, write_tasks
from texts import HALVES, REFERENCE, SOURCES, write_texts

RESULTS = REPO / "bench/results/quality.json"

SPARSITIES = ("0.5", "0.6", "0.7", "2:4")
# The sparsity of the tables that have a column for each text, task or phase.
DETAILED = "0.6"
WINDOWS = ["--nsamples", "64", "--seqlen", "512"]
EVALUATION = ["--seqlen", "512", "--eval-windows", "20", "--limit", "300"]
TINY_WINDOWS = ["--nsamples", "4", "--seqlen", "32"]
TINY_EVALUATION = ["--seqlen", "32", "--eval-windows", "2", "--limit", "4"]


# The flags of each row's run.
ROWS = {
    "magnitude": "--method magnitude",
    "Wanda": "--method wanda",
    "masks only": "--refit 0",
    "the paper's preset": "--preset paper",
    "SparseGPT": "--method sparsegpt",
    "ADMM": "--method admm",
    "neither reconstructed nor recovered": "--reconstruct 0 --recover 0",
    "Wanda, reconstructed": "--method wanda --reconstruct 2",
    "SparseGPT, reconstructed": "--method sparsegpt --reconstruct 2",
    "reconstructed, not recovered": "--recover 0",
    "the default": "",
    "the default, 131,072 tokens": "--recover 131072",
    "Wanda, recovered, 131,072 tokens": "--method wanda --recover 131072",
    "SparseGPT, recovered, 131,072 tokens": "--method sparsegpt --recover 131072",
}


def check_texts(results: dict[str, dict], paths: list[Path]) -> None:
    """Add the hashes of texts to the results.

    Raises:
        SystemExit: the results are of another text of the same name.
    """
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if results["texts"].setdefault(path.name, digest) != digest:
            sys.exit(f"{path.name}: the results are of another text of this name; give another --results")


def measure(row: str, sparsity: str, folder: Path, pruning: list[str], evaluation: list[str]) -> tuple[dict, dict]:
    """Prune and evaluate.

    Args:
        row: the row.
        sparsity: the sparsity.
        folder: folder of the outputs. Rows with the same flags share a pruned checkpoint.
        pruning: flags that all runs have.
        evaluation: arguments that all evaluations have.

    Returns:
        The part of the cell that tells how it was made, and the content of evaluation.json.
    """
    flags = ROWS[row]
    output, commands = folder / re.sub(r"\W+", "-", f"pruned {flags} {sparsity}"), []
    if not output.exists():
        program = ["bench/quality/admm.py"] if "admm" in flags else ["-m", "sparsefw.run"]
        commands.append([*program, *pruning, *flags.split(), "--sparsity", sparsity, "--output", str(output)])
    commands.append(["-m", "sparsefw.evaluate", str(output), *evaluation, "--output", str(output), "--overwrite"])
    seconds = {}
    for command in commands:
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, check=True)
        seconds[" ".join(command)] = round(time.perf_counter() - started, 1)
    report = json.loads((output / "report.json").read_text("utf-8"))
    made = {
        "commit": commit(),
        "machine": {"cpu": cpu(), "device": report["device"], **report["versions"]},
        "commands": seconds,
        "seconds": report["seconds"],
    }
    layers = [layer for layer in report["layers"] if layer["method"] == report["arguments"]["method"]]
    # An error compares with Wanda's only where a layer approximates its own product.
    if all(layer["target"] == "layer" for layer in layers):
        made["error"] = fmean(layer["relative_error"] for layer in layers)
    return made, json.loads((output / "evaluation.json").read_text("utf-8"))


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
        # The tiny model knows less than nothing of some tasks.
        above = max(by[dense]["value"] - CHANCE[name.removeprefix(f"{half}_")], 0.01)
        lost.append((by[dense]["value"] - by[model]["value"]) / above)
        errors.append((by[model]["difference"] or {"stderr": 0})["stderr"] / above)
    return {
        "perplexity": {name: by[model]["value"] for name, by in texts.items()},
        "accuracy": {name: by[model]["value"] for name, by in tasks.items()},
        "ratio": math.exp(fmean(logs)),
        "lost": [fmean(lost), math.hypot(*errors) / len(errors)],
    }


def near(cell: dict) -> str:
    """Write the perplexities of the texts that are not far ones."""
    return " / ".join(f"{x:.1f}" for name, x in cell["perplexity"].items() if not name.startswith(HALVES))


# The figures of the tables with a column for each sparsity.
FIGURES = {
    "perplexity of near texts": near,
    "perplexity of far texts, relative to the dense model's": lambda cell: f"{cell['ratio']:.2f}",
    "lost by tasks, %": lambda cell: "{:.1f} ± {:.1f}".format(*(100 * x for x in cell["lost"])),
    "error of layers, relative to Wanda's": lambda cell: f"{cell['error']:.3f}",
}
# The parts of a cell that have a table with a column for each entry, and the format of their figures.
DETAILS = {"perplexity": "{:.1f}", "accuracy": "{:.1%}", "seconds": "{:.0f}"}


def tables(cells: dict[str, dict]) -> str:
    """Make all tables of these cells, each after its name. A cell of an older study may lack the figure of a table."""
    # The cells of the sparsity with all rows come first, and tell the order of the rows.
    ordered = sorted(cells, key=lambda key: not key.endswith(DETAILED))
    made = {}
    for name, figure in FIGURES.items():
        made[name] = {}
        for row, sparsity in (key.split(" | ") for key in ordered):
            with suppress(KeyError):
                made[name].setdefault(row, {})[sparsity] = figure(cells[f"{row} | {sparsity}"])
    for part, form in DETAILS.items():
        made[f"{part} at {DETAILED}"] = {
            key.partition(" | ")[0]: {head: form.format(x) for head, x in cells[key].get(part, {}).items()}
            for key in ordered
            if key.endswith(DETAILED)
        }
    return "\n".join(f"{name}\n\n{markdown(rows)}" for name, rows in made.items())


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """Make a table in Markdown of texts by row and column."""
    heads = sorted({head for texts in rows.values() for head in texts})
    lines = [[row, *(texts.get(head, "") for head in heads)] for row, texts in rows.items() if any(texts.values())]
    return plain([["", *heads], *lines])


def study(arguments: argparse.Namespace, results: dict[str, dict]) -> None:
    """Measure the cells that are missing, and write the results after each."""
    folder, half = arguments.folder.resolve(), arguments.half
    calibration, *held_out = (path.resolve() for path in arguments.texts)
    model, windows, evaluation = str(folder / "smollm2"), WINDOWS, EVALUATION
    sources = [REFERENCE, *(source for source in SOURCES if source.name.startswith(half))]
    if arguments.tiny:
        model, windows, evaluation = "default", TINY_WINDOWS, TINY_EVALUATION
        sources = [replace(REFERENCE, name=f"{half}_reference")]
    elif not Path(model).exists():
        build_checkpoint(Path(model))
    suite = folder / half
    if not suite.exists():
        documents = write_texts(suite, sources, calibration)
        # In comments of code there is English, too.
        prose = [name for name in documents if name.startswith(half) and "code" not in name]
        write_tasks(suite, half, [document for name in prose for document in documents[name]])
    held_out += sorted(suite.glob("*.txt"))
    check_texts(results, [calibration, *held_out])
    texts = [flag for path in held_out for flag in ("--eval", str(path))]
    evaluation = ["--against", model, *texts, "--tasks", half, "--include-path", str(suite), *evaluation]
    pruning = ["--model", model, "--dataset", str(calibration), *windows]
    for sparsity, row in product(SPARSITIES, ROWS):
        key = f"{row} | {sparsity}"
        if arguments.only not in key or key in results["cells"]:
            continue
        made, found = measure(row, sparsity, folder, pruning, evaluation)
        pruned = next(name for name in found["models"] if name != model)
        results["cells"].setdefault(f"dense | {DETAILED}", evaluated(found, model, half))
        results["cells"][key] = made | evaluated(found, pruned, half)
        # The file is never there in part.
        partial = arguments.results.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        partial.replace(arguments.results)


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="folder for the model, texts and outputs")
    add("texts", type=Path, nargs="*", metavar="TEXT.txt", help="calibration text, then texts of its kind")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="default: bench/results/quality.json")
    add("--only", default="", metavar="TEXT", help="measure cells with this in their name, such as 'Wanda | 0.6'")
    add("--half", choices=HALVES, default="report", help="half of the far texts (default: report)")
    add("--table", action="store_true", help="measure nothing, and print the tables of the results")
    add("--tiny", action="store_true", help="prune the built-in model in place of SmolLM2")
    arguments = parser.parse_intermixed_args(argv)
    path = arguments.results
    results = json.loads(path.read_text("utf-8")) if path.exists() else {"texts": {}, "cells": {}}
    if not arguments.table:
        if len(arguments.texts) < 2:
            parser.error("a folder, a calibration text and a text of its kind are needed")
        study(arguments, results)
    print(tables(results["cells"]))


if __name__ == "__main__":
    main()
