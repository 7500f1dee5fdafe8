"""Quality on SmolLM2-135M-Instruct: `python bench/quality/quality.py CALIBRATION.txt TEST.txt [OTHER.txt ...]`.

Every cell of the study (method, pattern, seed, calibration windows) is one run of the product in a process of its own,
and one line of the results file. A cell in the file is not run again, so an interrupted study goes on. Options select
the cells that are run and printed: by default the methods, with --study the settings.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import baselines
from checkpoint_smollm2 import build_checkpoint
from dense_layers import dense_layers
from quality_curves import measure_curves
from quality_settings import measure_budgets, measure_settings
from quality_settings import table as settings_table
from torch import Tensor

import sparsefw.run
from sparsefw.cli import inputs_and_config, run_parser
from sparsefw.errors import InputError
from sparsefw.kernels.backend import Backend
from sparsefw.report import Report, read_report
from sparsefw.solver import METHODS, PruneConfig
from sparsefw.solver.choices import CHOOSE, Choice, Rows, choose_weights
from sparsefw.solver.methods import Method
from sparsefw.solver.objective import mask_error
from sparsefw.solver.refit import refit

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
MASKS, DEFAULT, SPARSEGPT = "masks only (`--refit 0`)", "the default", "SparseGPT"
LAYERWISE = "layer by layer (`--target layer`)"
MASKS_OF_TARGETS = "masks only, of the dense model's outputs (`--refit 0 --target dense`)"

# Name in the table: flags of the run.
METHODS_OF_TABLE = {
    "magnitude": ["--method", "magnitude"],
    "Wanda": ["--method", "wanda"],
    "RIA": ["--method", "ria"],
    "best 1-swaps from Wanda": ["--method", "one-swaps"],
    "the paper's (`--preset paper --steps 100`)": ["--preset", "paper", "--steps", "100"],
    MASKS: ["--refit", "0"],
    MASKS_OF_TARGETS: ["--refit", "0", "--target", "dense"],
    SPARSEGPT: ["--method", "sparsegpt"],
    "ADMM": ["--method", "admm"],
    "ADMM + refit": ["--method", "admm-refit"],
    LAYERWISE: ["--target", "layer"],
    DEFAULT: [],
}

# Settings that are varied alone, at 0.6, from masks only and from the default.
SETTINGS = {"alpha": (0.0, 0.25, 0.5, 0.75, 0.9), "penalty": (0.0, 1.0), "steps": (20, 30, 60)}

KEPT_OF_LAYERS = ("name", "error_warm_start", "error_mask", "error", "alpha", "kept")


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    method: str
    flags: tuple[str, ...]
    pattern: str
    seed: int
    nsamples: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.method} | {self.pattern} | seed {self.seed} | {self.nsamples} windows"


@dataclass(frozen=True)
class Study:
    """What all cells of one results file share."""

    model: Path
    calibration: Path
    held_out: list[Path]
    seqlen: int
    eval_windows: int

    def header(self) -> dict:
        """What the results file says of the study: names without folders, and the texts by their hash."""
        hashes = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest()} for p in (self.calibration, *self.held_out)]
        names = {"model": self.model.name, "calibration": hashes[0], "held_out": hashes[1:]}
        return names | {"seqlen": self.seqlen, "eval_windows": self.eval_windows}


def config_of(flags: Sequence[str]) -> PruneConfig:
    """The config of these flags of the run."""
    return inputs_and_config(run_parser(None).parse_args(list(flags)))[1]


def resolved(flags: Sequence[str]) -> dict:
    """The settings that a method's flags stand for, with defaults; only those that the method uses."""
    config = config_of(flags)
    names = [f.name for f in fields(config) if f.metadata.get("frank_wolfe")] if config.method == "sparsefw" else []
    return {name: getattr(config, name) for name in ("method", *names)}


def rows_of_table(settings: bool) -> list[tuple[str, list[str], tuple[str, ...]]]:
    """Method, flags and patterns of each row: of the methods, or of the study of settings."""
    if not settings:
        return [(name, flags, PATTERNS) for name, flags in METHODS_OF_TABLE.items()]
    rows = [(SPARSEGPT, METHODS_OF_TABLE[SPARSEGPT], ("layer:0.6",))]
    for base in (MASKS, DEFAULT):
        flags = METHODS_OF_TABLE[base]
        rows.append((base, flags, ("0.6", "layer:0.6")))
        for name, values in SETTINGS.items():
            # The row of the base has the value that the base has by itself.
            for value in (v for v in values if v != resolved(flags)[name]):
                rows.append((f"{base}, {name} {value:g}", [*flags, f"--{name}", f"{value:g}"], ("0.6",)))
    return rows


def select(*, settings: bool, only: str, wanted: list[str] | None, seeds: list[int], nsamples: list[int]) -> list[Cell]:
    """The cells of a selection, pattern by pattern.

    Args:
        settings: whether to select the study of settings instead of the methods.
        only: text that the method's name contains.
        wanted: patterns; None takes the study's own. Methods are run at any pattern, settings only at the study's.
        seeds, nsamples: seeds of the calibration, and numbers of its windows.
    """
    rows = [row for row in rows_of_table(settings) if only in row[0]]
    known = list(dict.fromkeys(pattern for _, _, where in rows for pattern in where))
    return [
        Cell(method, tuple(flags), pattern, seed, n)
        for n in nsamples
        for seed in seeds
        for pattern in wanted or known
        for method, flags, where in rows
        if pattern in where or not settings
    ]


def _one_budget(rows: Rows, config: PruneConfig) -> int:
    if isinstance(rows.k, Tensor):
        raise InputError(f"--sparsity {config.sparsity}: this method takes the same budget in every row only")
    return rows.k


def _admm(rows: Rows, config: PruneConfig, *, steps: int) -> tuple[Tensor, Tensor]:
    """ADMM; with steps > 0 its weights are refitted as the product's are."""
    mask, Z = baselines.admm(rows.W, rows.G, _one_budget(rows, config), group=config.pattern.group)
    if not steps:
        return mask, Z
    return mask, refit(rows.W, rows.damped, mask, Z, steps).Z


def _one_swaps(rows: Rows, config: PruneConfig, backend: Backend) -> Choice:
    """Best 1-swaps from the warm start."""
    group = config.pattern.group
    warm = backend.lmo(rows.saliency, _one_budget(rows, config), group=group)
    mask = baselines.one_swaps(rows.W, rows.G, warm, group=group)
    error, before = (mask_error(rows.W, m, rows.G, backend=backend) for m in (mask, warm))
    return Choice(mask, None, error, error, before, None)


# Added to `--method` in the processes of the benchmark. ADMM factors G in every call, so rows are not solved in chunks.
BASELINES = {
    "one-swaps": Method(saliency="wanda"),
    "admm": Method(saliency="wanda", rows_independent=False),
    "admm-refit": Method(saliency="wanda", rows_independent=False, uses_damping=True),
}
CHOOSE_BASELINES = {
    "one-swaps": _one_swaps,
    "admm": choose_weights(partial(_admm, steps=0)),
    "admm-refit": choose_weights(partial(_admm, steps=10)),
}


def run_apart(flags: list[str]) -> int:
    """Run the product's command line in a process with a peak of memory of its own; returns the exit status."""
    return subprocess.run([sys.executable, __file__, "--cell", *flags], stdout=subprocess.DEVNULL).returncode


def run_cell(cell: Cell, study: Study, launch: Callable[[list[str]], int] = run_apart) -> dict:
    """Run one cell; returns its entry in the results.

    Raises:
        SystemExit: the run failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--model", str(study.model), "--dataset", str(study.calibration), "--seqlen", str(study.seqlen)]
        flags += ["--nsamples", str(cell.nsamples), "--seed", str(cell.seed), "--sparsity", cell.pattern]
        flags += [flag for path in study.held_out for flag in ("--eval", str(path))]
        flags += ["--eval-windows", str(study.eval_windows), "--output", f"{scratch}/out", *cell.flags]
        if status := launch(flags):
            raise SystemExit(f"{cell.key}: exit status {status}")
        return entry(cell, read_report(Path(scratch, "out", "report.json")))


def entry(cell: Cell, report: Report) -> dict:
    """What the study keeps of a report: texts by their file names, layers by column, six digits of an error."""
    method, layers = report.arguments["method"], report.layers
    arguments = {name: value for name, value in report.arguments.items() if name != "output"}
    arguments |= {name: Path(arguments[name]).name for name in ("model", "dataset")}
    arguments["evaluate"] = [Path(text).name for text in arguments["evaluate"]]
    texts = {Path(text.source).name: text.perplexity for text in report.evaluation}
    columns = {name: [_short(getattr(layer, name)) for layer in layers] for name in KEPT_OF_LAYERS}
    return {
        "method": cell.method,
        "pattern": cell.pattern,
        "seed": cell.seed,
        "nsamples": cell.nsamples,
        "flags": list(cell.flags),
        "arguments": arguments,
        "perplexity": {name: perplexity[method] for name, perplexity in texts.items()},
        "dense": {name: perplexity["dense"] for name, perplexity in texts.items()},
        "relative_mask": sum(layer.relative_mask for layer in layers) / len(layers),
        "relative_error": sum(layer.relative_error for layer in layers) / len(layers),
        "warm_start": layers[0].warm_start,
        "seconds": report.seconds,
        "peak_memory": report.peak_memory,
        "versions": report.versions,
        "device": report.device,
        "data": asdict(report.data) | {"source": Path(report.data.source).name},
        "layers": columns,
    }


def _short(value: float | int | str | None) -> float | int | str | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load(path: Path) -> dict:
    """The results so far."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {"study": {}, "cells": {}, "curves": {}, "settings": {}, "budgets": {}} | stored


def save(path: Path, results: dict) -> None:
    """Write the results, one line for each cell; the file is never there in part."""
    sections = []
    for name, content in results.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        sections.append(f' "{name}": {{\n{lines}\n }}')
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")
    os.replace(partial_file, path)


def missing(results: dict, cells: list[Cell]) -> list[Cell]:
    """The cells that the results lack, or have with other settings: a default may have changed since."""
    done = {key: entry["arguments"] for key, entry in results["cells"].items()}
    return [
        cell
        for cell in cells
        if cell.key not in done
        or not resolved([*cell.flags, "--sparsity", cell.pattern]).items() <= done[cell.key].items()
    ]


def tables(results: dict, cells: list[Cell]) -> str:
    """Markdown of the cells in the results: a table for each pattern and number of calibration windows."""
    groups: dict[tuple[str, int], dict[str, list[dict]]] = {}
    for cell in (cell for cell in cells if cell.key in results["cells"]):
        rows = groups.setdefault((cell.pattern, cell.nsamples), {})
        rows.setdefault(cell.method, []).append(results["cells"][cell.key])
    return "\n\n".join(_table(*group, rows) for group, rows in groups.items())


def _table(pattern: str, nsamples: int, rows: dict[str, list[dict]]) -> str:
    first = next(iter(rows.values()))[0]
    texts = list(first["perplexity"])
    head = ["method", *(f"perplexity, {text}" for text in texts), "mask only", "relative error", "seconds"]
    lines = [f"Sparsity {pattern}, {nsamples} calibration windows", "", _line(head), _line(["---"] * len(head))]
    lines.append(_line(["dense", *(f"{first['dense'][text]:.2f}" for text in texts), "", "", ""]))
    for name, runs in rows.items():
        cells = [mean_and_spread([run["perplexity"][text] for run in runs]) for text in texts]
        for what in ("relative_mask", "relative_error"):
            # An error relative to another saliency's mask cannot be compared with those relative to Wanda's.
            comparable = runs[0]["warm_start"] == "wanda"
            cells.append(mean_and_spread([run[what] for run in runs], 3) if comparable else "")
        cells.append(mean_and_spread([run["seconds"]["solve"] for run in runs], 0))
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """The mean; of several values also maximum - minimum, in brackets."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return f"{mean} ({max(values) - min(values):.{digits}f})" if len(values) > 1 else mean


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", type=Path, nargs="*", metavar="TEXT.txt", help="text to calibrate on, then held-out texts")
    add("--model", type=Path, default=Path("smollm2"), help="checkpoint, made if it is not there")
    add("--results", type=Path, default=Path("quality.json"), help="cells in it are not run again")
    add("--table", action="store_true", help="run nothing, print what is in the results")
    add("--plots", type=Path, metavar="DIR", help="draw the results there (needs matplotlib)")
    add("--study", action="store_true", help="the settings instead of the methods")
    add("--only", default="", metavar="TEXT", help="methods whose name contains this")
    add("--patterns", type=lambda text: text.split(","), metavar="P,P", help="(default: all of the study)")
    for name, default in (("seeds", "0"), ("nsamples", "64")):
        add(f"--{name}", type=_numbers, default=default, metavar="N,N", help=f"(default: {default})")
    add("--curves", type=_numbers, default="8", metavar="N,N", help="blocks whose errors by step are measured, '' for "
        "none (default: 8)")  # fmt: skip
    add("--settings", type=_numbers, default="", metavar="N,N", help="blocks on whose layers settings are compared by "
        "their error on held-out text (default: none)")  # fmt: skip
    add("--seqlen", type=int, default=512)
    add("--eval-windows", type=int, default=20)
    arguments = parser.parse_args(argv)
    if not arguments.table and len(arguments.texts) < 2:
        parser.error("a text to calibrate on and a held-out text are needed")
    names = [path.name for path in arguments.texts]
    if len(set(names)) < len(names):
        parser.error("two texts have the same file name, by which the results tell them apart")
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main(argv: list[str] | None = None, launch: Callable[[list[str]], int] = run_apart) -> None:
    """Run what is missing, print the tables, draw the plots."""
    METHODS.update(BASELINES)
    CHOOSE.update(CHOOSE_BASELINES)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--cell"]:
        sys.exit(sparsefw.run.main(argv[1:]))
    arguments = _parse(argv)
    cells = select(
        settings=arguments.study,
        only=arguments.only,
        wanted=arguments.patterns,
        seeds=arguments.seeds,
        nsamples=arguments.nsamples,
    )
    results = load(arguments.results)
    if not arguments.table:
        calibration, *held_out = arguments.texts
        study = Study(arguments.model, calibration, held_out, arguments.seqlen, arguments.eval_windows)
        if results["study"] not in ({}, study.header()):
            sys.exit(f"{arguments.results}: holds cells of another model, texts or windows: {results['study']}")
        results["study"] = study.header()
        if not study.model.exists():
            build_checkpoint(study.model)
        for cell in missing(results, cells):
            results["cells"][cell.key] = run_cell(cell, study, launch)
            save(arguments.results, results)
            print(f"{cell.key}: {results['cells'][cell.key]['perplexity']}", file=sys.stderr, flush=True)
        for block in (b for b in arguments.curves if str(b) not in results["curves"]):
            options = {"nsamples": arguments.nsamples[0], "seqlen": study.seqlen}
            results["curves"][str(block)] = measure_curves(study.model, calibration, block, **options)
            save(arguments.results, results)
        by_blocks = ",".join(map(str, arguments.settings))
        if by_blocks and by_blocks not in results["settings"]:
            options = {"nsamples": arguments.nsamples[0], "seqlen": study.seqlen, "limit": study.eval_windows}
            layers = list(dense_layers(study.model, calibration, held_out, arguments.settings, **options))
            results["settings"][by_blocks] = measure_settings(layers, PATTERNS)
            results["budgets"][by_blocks] = measure_budgets(layers)
            save(arguments.results, results)
    print(tables(results, cells))
    for section in ("settings", "budgets"):
        for blocks, measured in results[section].items():
            names = [name for text in results["study"]["held_out"] for name in text]
            print(f"\n{section.capitalize()}, blocks {blocks}\n\n{settings_table(measured, names)}")
    if arguments.plots:
        # Imported only here: nothing else needs matplotlib.
        from quality_plots import plot

        plot(results, cells, arguments.plots)


if __name__ == "__main__":
    main()
