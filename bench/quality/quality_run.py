"""The runs of the quality study: one cell is one run of the product, in a process of its own."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quality_cells import REFERENCE, Cell
from texts import Reference

import sparsefw
from sparsefw.report import Report, read_report
from sparsefw.timeline import MAIN

KEPT_OF_LAYERS = ("name", "error_warm_start", "error_mask", "error", "alpha", "kept")

# The code that a result depends on.
CODE = ("sparsefw", "kernels", "bench/quality")

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Study:
    """The model, the texts and the windows that all cells of one results file share.

    Attributes:
        model: the checkpoint.
        calibration, held_out: texts that settings may be chosen on.
        reference: the text that no study of settings looks at.
        seqlen: tokens in a window.
        eval_windows: windows of each held-out text.
        work: where unfinished cells stay; None: they do not.
    """

    model: Path
    calibration: Path
    held_out: list[Path]
    reference: Reference
    seqlen: int
    eval_windows: int
    work: Path | None = None

    def header(self) -> dict:
        """The study as the results file describes it: names without folders, and the texts by their hash."""
        hashes = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest()} for p in (self.calibration, *self.held_out)]
        names = {"model": self.model.name, "calibration": hashes[0], "held_out": hashes[1:]}
        size = {"seqlen": self.seqlen, "eval_windows": self.eval_windows}
        return names | size | {"reference": self.reference.header()}

    def check(self, stored: dict) -> None:
        """Check that results with the header `stored` go on with this study. Those without a reference do.

        Raises:
            ValueError: they are of another model, other texts or other windows.
        """
        own = self.header()
        reference = own.pop("reference")
        if stored and own != (others := {name: value for name, value in stored.items() if name != "reference"}):
            raise ValueError(f"holds cells of another model, texts or windows: {others}")
        if (known := stored.get("reference", reference)) != reference:
            raise ValueError(f"holds cells of the reference of Python {known['python']}, not {reference['python']}")


def run_apart(flags: list[str]) -> int:
    """Run the product's command line in a process with a peak of memory of its own; returns the exit status."""
    command = [sys.executable, str(Path(__file__).with_name("quality.py")), "--cell", *flags]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode


def run_cell(cell: Cell, study: Study, folder: Path, launch: Callable[[list[str]], int] = run_apart) -> dict:
    """Run one cell; returns its entry in the results.

    Args:
        cell, study: the cell and its study.
        folder: where the output goes. A run that was begun there goes on.
        launch: makes a run of its flags; returns the exit status.

    Raises:
        SystemExit: the run failed; it has said why.
    """
    calibration = study.reference.calibration if cell.calibrated_on == REFERENCE else study.calibration
    held_out = study.held_out if cell.tuning else [*study.held_out, study.reference.test]
    flags = ["--model", str(study.model), "--dataset", str(calibration), "--seqlen", str(study.seqlen)]
    flags += ["--nsamples", str(cell.nsamples), "--seed", str(cell.seed), "--sparsity", cell.pattern]
    flags += [flag for path in held_out for flag in ("--eval", str(path))]
    flags += ["--eval-windows", str(study.eval_windows), *cell.flags]
    code = {"commit": code_version(), "threads": torch.get_num_threads()}
    output = folder / "out"
    # An interruption may have come before the entry of a finished run was saved.
    if not output.exists() and (status := launch([*flags, "--output", str(output)])):
        raise SystemExit(f"{cell.key}: exit status {status}")
    return entry(cell, read_report(output / "report.json")) | code


@contextmanager
def folder_of(cell: Cell, study: Study) -> Iterator[Path]:
    """A folder for the output of a cell. In `study.work` it is there until the `with` block has ended without error.

    Raises:
        SystemExit: it shall stay there, and the code is not that of a commit.
    """
    if study.work is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    commit = code_version()
    if not commit.isalnum() or commit == UNKNOWN:
        raise SystemExit(f"{study.work}: unfinished cells are kept for a commit, and the code is not that of one")
    # Other code does not go on with what this one has begun.
    folder = study.work / f"{hashlib.sha256(cell.key.encode()).hexdigest()[:12]}-{commit}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def entry(cell: Cell, report: Report) -> dict:
    """The part of a report that the study keeps: texts by file name, layers by column, six digits of an error."""
    method, layers = report.arguments["method"], report.layers
    arguments = {name: value for name, value in report.arguments.items() if name != "output"}
    arguments["model"] = Path(arguments["model"]).name
    arguments |= {name: [Path(text).name for text in arguments[name]] for name in ("dataset", "evaluate")}
    texts = {Path(text.source).name: text.perplexity for text in report.evaluation}
    columns = {name: [_short(getattr(layer, name)) for layer in layers] for name in KEPT_OF_LAYERS}
    return {
        "method": cell.method,
        "pattern": cell.pattern,
        "seed": cell.seed,
        "nsamples": cell.nsamples,
        "calibrated_on": cell.calibrated_on,
        "flags": list(cell.flags),
        "arguments": arguments,
        "perplexity": {name: perplexity[method] for name, perplexity in texts.items()},
        "dense": {name: perplexity["dense"] for name, perplexity in texts.items()},
        "relative_mask": sum(layer.relative_mask for layer in layers) / len(layers),
        "relative_error": sum(layer.relative_error for layer in layers) / len(layers),
        "warm_start": layers[0].warm_start,
        "seconds": seconds_of_all_parts(report),
        "peak_memory": report.peak_memory,
        "versions": report.versions,
        "device": report.device,
        "data": asdict(report.data) | {"source": Path(report.data.source).name},
        "layers": columns,
    }


def seconds_of_all_parts(report: Report) -> dict[str, float]:
    """Seconds by phase, with those of the runs that an interrupted run has gone on from.

    The report's own are of the last run. Each block has those of the run that pruned it.
    """
    outside = [span for span in report.timeline if span.block is None and span.lane == MAIN]
    spent = [(span.phase, span.end - span.start) for span in outside]
    spent += [item for block in report.blocks for item in block.seconds.items()]
    return {phase: sum(seconds for name, seconds in spent if name == phase) for phase in dict(spent)}


def _short(value: float | int | str | None) -> float | int | str | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def code_version() -> str:
    """The commit of the code that runs, with a + if its files differ from it.

    UNKNOWN outside of a checkout, and where the package comes from another one than this file.
    """
    root = Path(sparsefw.__file__).resolve().parents[1]
    if Path(__file__).resolve().parents[2] != root or not (root / ".git").exists() or not shutil.which("git"):
        return UNKNOWN
    commands = ["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *CODE]
    head, changes = (subprocess.run(["git", "-C", root, *c], capture_output=True, text=True) for c in commands)
    if head.returncode or changes.returncode:
        # git refuses the checkout of another user.
        return UNKNOWN
    return head.stdout.strip() + "+" * bool(changes.stdout)
