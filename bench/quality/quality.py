"""Quality on SmolLM2-135M-Instruct: `python bench/quality/quality.py CALIBRATION.txt TEST.txt [OTHER.txt ...]`.

Every cell of the study (method, pattern, seed, calibration text) is one run of the product in a process of its own, and
one line of the results file. A cell in the file is not run again unless --again names it, so an interrupted study goes
on. All cells are evaluated on the language reference of this Python, too; --settings, which compares settings, does not
look at it.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

# The package of this checkout, whatever is installed; and texts.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))

import baselines
import texts
from checkpoint_smollm2 import build_checkpoint
from quality_cells import EVAL_WINDOWS, METHODS, OWN, SEQLEN, Cell, cells
from quality_settings import measure
from quality_settings import table as settings_table
from quality_tables import tables

import sparsefw.run
from sparsefw.report.content import read_report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "smollm2-quality.json"
KEPT_OF_LAYERS = ("name", "error_warm_start", "error_mask", "error", "alpha", "kept")


def load(path: Path) -> dict:
    """The results so far."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"texts": {}, "cells": {}, "settings": {}} | stored


def save(path: Path, results: dict) -> None:
    """Write the results, one line for each cell; the file is never there in part."""
    sections = []
    for name, content in results.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        sections.append(f' "{name}": {{\n{lines}\n }}')
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")
    os.replace(partial_file, path)


def check_texts(results: dict, texts_of_study: list[Path]) -> None:
    """Check that results go on with these texts, by their hashes.

    Raises:
        SystemExit: a text of this name was another one.
    """
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in texts_of_study}
    known = results["texts"]
    if changed := [name for name, digest in hashes.items() if known.get(name, digest) != digest]:
        raise SystemExit(f"{changed[0]}: the results are of another text of this name; see --results")
    known |= hashes


def commit() -> str:
    """The commit of the code, with a + if its files differ from it."""

    def git(command: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *command.split()], capture_output=True, text=True, check=True).stdout

    changes = git("status --porcelain -- sparsefw kernels bench/quality")
    return git("rev-parse --short=12 HEAD").strip() + "+" * bool(changes)


def run_in_process(flags: list[str]) -> int:
    """Run the product, with the baselines among its methods, in a process of its own."""
    return subprocess.run([sys.executable, __file__, "--cell", *flags]).returncode


def run_cell(cell: Cell, model: Path, calibration: Path, held_out: list[Path], output: Path, launch: Callable) -> dict:
    """Run a cell; returns its entry of the results, with texts by their file names and errors of layers by column.

    Raises:
        SystemExit: the run failed.
    """
    flags = ["--model", str(model), "--dataset", str(calibration), "--seqlen", str(SEQLEN), "--seed", str(cell.seed)]
    flags += ["--nsamples", str(cell.nsamples), "--sparsity", cell.pattern, "--eval-windows", str(EVAL_WINDOWS)]
    flags += [flag for path in held_out for flag in ("--eval", str(path))]
    if status := launch([*flags, *METHODS[cell.method], "--output", str(output)]):
        raise SystemExit(f"{cell.key}: exit status {status}")
    report = read_report(output / "report.json")
    layers = [layer for layer in report.layers if layer.method == report.method]
    perplexity = {Path(text.source).name: text.perplexity for text in report.evaluation}
    return {
        **asdict(cell),
        "commit": commit(),
        "versions": report.versions,
        "perplexity": {name: by_method[report.method] for name, by_method in perplexity.items()},
        "dense": {name: by_method["dense"] for name, by_method in perplexity.items()},
        "relative_error": sum(layer.relative_error for layer in layers) / len(layers),
        "seconds": report.seconds,
        "layers": {name: [getattr(layer, name) for layer in layers] for name in KEPT_OF_LAYERS},
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", type=Path, nargs="*", metavar="TEXT.txt", help="text to calibrate on, then held-out texts")
    add("--model", type=Path, default=Path("smollm2"), help="checkpoint, made if it is not there")
    add("--results", type=Path, default=RESULTS, help=f"cells in it are not run again (default: {RESULTS.name})")
    add("--table", action="store_true", help="run nothing, print what is in the results")
    add("--again", action="store_true", help="run the selected cells that another commit has made, too")
    add("--only", default="", metavar="TEXT", help="the cells whose names contain it: method | pattern | seed ...")
    add("--settings", default="", metavar="N,N", help="blocks on whose layers settings are compared by their error on "
        "held-out text, in place of cells")  # fmt: skip
    arguments = parser.parse_args(argv)
    if not arguments.table and len(arguments.texts) < 2:
        parser.error("a text to calibrate on and a held-out text are needed")
    if not any(arguments.only in cell.key for cell in cells()):
        parser.error(
            f"--only {arguments.only}: no cell has this in its name, {cells()[0].key!r}; methods: {[*METHODS]}"
        )
    return arguments


def _run(arguments: argparse.Namespace, results: dict, launch: Callable[[list[str]], int]) -> None:
    """Run what is missing, and save the results after every cell."""
    calibration, *held_out = arguments.texts
    if not arguments.model.exists():
        build_checkpoint(arguments.model)
    check_texts(results, arguments.texts)
    if blocks := arguments.settings:
        measured = measure(arguments.model, calibration, held_out, [int(n) for n in blocks.split(",")])
        results["settings"][blocks] = measured
        save(arguments.results, results)
        return
    with tempfile.TemporaryDirectory() as scratch:
        reference, reference_test = texts.write_reference(Path(scratch))
        check_texts(results, [reference, reference_test])
        for cell in (cell for cell in cells() if arguments.only in cell.key):
            known = results["cells"].get(cell.key)
            if known and (known.get("commit") == commit() or not arguments.again):
                continue
            text = calibration if cell.calibrated_on == OWN else reference
            with tempfile.TemporaryDirectory() as folder:
                every = [*held_out, reference_test]
                entry = run_cell(cell, arguments.model, text, every, Path(folder, "out"), launch)
            results["cells"][cell.key] = entry
            save(arguments.results, results)
            print(f"{cell.key}: {entry['perplexity']}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None, launch: Callable[[list[str]], int] = run_in_process) -> None:
    """Run what is missing, and print the tables."""
    baselines.register()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--cell"]:
        sys.exit(sparsefw.run.main(argv[1:]))
    arguments = _parse(argv)
    results = load(arguments.results)
    if not arguments.table:
        _run(arguments, results, launch)
    print(tables(results))
    for blocks, measured in results["settings"].items():
        print(f"Settings, blocks {blocks}\n\n{settings_table(measured)}")


if __name__ == "__main__":
    main()
