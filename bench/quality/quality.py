"""Measure the quality of pruned SmolLM2-135M-Instruct, and print tables of it.

    python bench/quality/quality.py FOLDER CALIBRATION.txt NEAR.txt ...
    python bench/quality/quality.py --table

A cell of the study is a row of ROWS at one sparsity. The script prunes the model for it. Then it evaluates the result
on each NEAR.txt, a text of the calibration text's kind; on the language reference of Python; on far texts (texts.py);
and on tasks made of the far texts (tasks.py). It measures no cell of the results file again, and prunes no checkpoint
again that is in FOLDER: the same command resumes a study, and another version of the code needs a new FOLDER. FOLDER
gets the model, the texts and the checkpoints, 270 MB each.

The far texts have two halves of other documents. Choose settings by `--half choose`, into other --results, and report
results of the other half.
With --curve the rows are those of CURVE: starts, recovered on more and more tokens of a mixture of texts.
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
from statistics import fmean, linear_regression

# The modules of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host import REPO, cpu
from report import plain
from smollm2 import build_checkpoint
from tasks import CHANCE, write_tasks
from texts import DOCUMENTS, HALVES, MIXTURE, REFERENCE, SOURCES, write_texts

RESULTS = REPO / "bench/results/quality.json"

SPARSITIES = ("0.5", "0.6", "0.7", "2:4")
# The sparsity of the tables that have a column for each text, task or phase.
DETAILED = "0.6"
WINDOWS = ["--nsamples", "64", "--seqlen", "512"]
CURVE_WINDOWS = ["--nsamples", "64", "--seqlen", "256"]
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
    "the default, 65,536 tokens": "--recover 65536",
    "the default": "",
}
# The rows of the curve: a start, and after it a recovery on a mixture of texts.
TOKENS = (32_768, 131_072, 524_288, 1_048_576, 2_097_152, 4_194_304)
PREDICTED = (4_194_304, 10_000_000, 100_000_000)
STARTS = {"the default": "--recover 0", "Wanda": "--method wanda", "SparseGPT": "--method sparsegpt"}
CURVE = {f"{start}, not recovered": flags for start, flags in STARTS.items()}
CURVE |= {
    f"{start} + {tokens:,}": f"{flags} then --recover {tokens}"
    for (start, flags), tokens in product(STARTS.items(), TOKENS)
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


def pruned(flags: str, sparsity: str, folder: Path, pruning: list[str], mixture: list[str]) -> tuple[str, dict]:
    """Prune, and recover on a mixture.

    Args:
        flags: flags of the run; after "then" those of the recovery that follows it.
        sparsity: the sparsity.
        folder: folder of the outputs. Rows with the same flags share a pruned checkpoint.
        pruning: flags that all runs have.
        mixture: flags that all recoveries have.

    Returns:
        The folder of the output, and the part of the cell that tells how it was made.
    """
    run, _, recovery = flags.partition(" then ")
    output, made = folder / re.sub(r"\W+", "-", f"pruned {flags} {sparsity}"), {"commands": {}}
    program = ["bench/quality/admm.py"] if "admm" in flags else ["-m", "sparsefw.run"]
    command = [*program, *pruning, *run.split(), "--sparsity", sparsity, "--output", str(output)]
    if recovery:
        start, made = pruned(run, sparsity, folder, pruning, mixture)
        command = ["-m", "sparsefw.recover", start, str(output), *recovery.split(), *mixture]
    if not output.exists():
        made["commands"][" ".join(command)] = measured(command)
    report = json.loads((output / "report.json").read_text("utf-8"))
    made |= {
        "machine": {"cpu": cpu(), "device": report["device"], **report["versions"]},
        "seconds": report["seconds"],
    }
    layers = [layer for layer in report["layers"] if layer["method"] == report["arguments"]["method"]]
    # An error compares with Wanda's only where a layer approximates its own product.
    if all(layer["target"] == "layer" for layer in layers):
        made["error"] = fmean(layer["relative_error"] for layer in layers)
    return str(output), made


def measured(command: list[str]) -> float:
    """Run a command of Python, and return its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, check=True)
    return round(time.perf_counter() - started, 1)


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
    made["perplexity of far texts after more tokens, as a line predicts"] = predictions(cells)
    return "\n".join(f"{name}\n\n{markdown(rows)}" for name, rows in made.items())


def predictions(cells: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Predict ratios of far texts after recoveries on more tokens, from those of the curve.

    They are a tokens^-b in their logarithms: a line, by least squares, if tokens have a logarithm, too.
    """
    points, made = {}, {}
    for key, cell in cells.items():
        start, more, tokens = key.partition(" | ")[0].partition(" + ")
        if more:
            point = math.log(int(tokens.replace(",", ""))), math.log(math.log(cell["ratio"]))
            points.setdefault(f"{start}, {key.partition(' | ')[2]}", []).append(point)
    for name, found in points.items():
        if len(found) > 1:
            slope, at_one = linear_regression(*zip(*found, strict=True))
            of = {tokens: math.exp(math.exp(slope * math.log(tokens) + at_one)) for tokens in PREDICTED}
            made[name] = {f"{tokens:>11,}": f"{ratio:.2f}" for tokens, ratio in of.items()}
    return made


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """Make a table in Markdown of texts by row and column."""
    heads = sorted({head for texts in rows.values() for head in texts})
    lines = [[row, *(texts.get(head, "") for head in heads)] for row, texts in rows.items() if any(texts.values())]
    return plain([["", *heads], *lines])


def study(arguments: argparse.Namespace, results: dict[str, dict]) -> None:
    """Measure the cells that are missing: prune for each, evaluate all models together, and write the results."""
    folder, half = arguments.folder.resolve(), arguments.half
    calibration, *held_out = (path.resolve() for path in arguments.texts)
    model, windows, evaluation = str(folder / "smollm2"), CURVE_WINDOWS if arguments.curve else WINDOWS, EVALUATION
    sources, mixture = [REFERENCE, *(source for source in SOURCES if source.name.startswith(half))], MIXTURE
    if arguments.tiny:
        model, windows, evaluation = "default", TINY_WINDOWS, TINY_EVALUATION
        sources, mixture = [replace(REFERENCE, name=f"{half}_reference")], ()
    elif not Path(model).exists():
        build_checkpoint(Path(model))
    suite = folder / half
    if not suite.exists():
        documents = write_texts(suite, sources, [calibration])
        # In comments of code there is English, too.
        prose = [name for name in documents if name.startswith(half) and "code" not in name]
        write_tasks(suite, half, [document for name in prose for document in documents[name]])
    held_out += sorted(suite.glob("*.txt"))
    check_texts(results, [calibration, *held_out])
    if arguments.curve and not (folder / "mixture").exists():
        write_texts(folder / "mixture", mixture, [calibration, *held_out], DOCUMENTS)
    texts = [flag for path in held_out for flag in ("--eval", str(path))]
    evaluation = ["--against", model, *texts, "--tasks", half, "--include-path", str(suite), *evaluation]
    pruning = ["--model", model, "--dataset", str(calibration), *windows]
    of_mixture = [calibration, *(folder / f"mixture/{source.name}.txt" for source in mixture)]
    mixed = ["--model", model, *(flag for path in of_mixture for flag in ("--dataset", str(path)))]
    rows, made = CURVE if arguments.curve else ROWS, {}
    for sparsity, row in product(SPARSITIES, rows):
        key = f"{row} | {sparsity}"
        if arguments.only in key and key not in results["cells"]:
            made[key] = pruned(rows[row], sparsity, folder, pruning, mixed)
    if not made:
        return
    outputs = list(dict.fromkeys(output for output, _ in made.values()))
    command = ["-m", "sparsefw.evaluate", *outputs, *evaluation, "--output", str(folder / "evaluated"), "--overwrite"]
    seconds = measured(command)
    found = json.loads((folder / "evaluated/evaluation.json").read_text("utf-8"))
    results["cells"].setdefault(f"dense | {DETAILED}", evaluated(found, model, half))
    for key, (output, how) in made.items():
        how["commands"][" ".join(command)] = seconds
        results["cells"][key] = how | evaluated(found, output, half)
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
    add("--curve", action="store_true", help="measure the rows of CURVE")
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
