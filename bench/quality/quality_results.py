"""The results file of the quality study: how it is read and written, and what it lacks."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import texts
from quality_cells import Cell, resolved

RESULTS = Path(__file__).parents[1] / "results" / "smollm2-quality.json"

# The commit of cells that were made before commits were recorded.
BEFORE_COMMITS = "before 2026-11"

# Stands for every commit where cells are to be run again.
ALL = "all"


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


def commit_of(entry: dict) -> str:
    """The commit of the code that made a cell."""
    return entry.get("commit", BEFORE_COMMITS)


def missing(results: dict, cells: Sequence[Cell], held_out: Sequence[str]) -> list[Cell]:
    """The cells that the results lack, lack a text of, or have with other settings.

    A default may have changed since a cell was made. A cell that other code made with the same settings is not missing.

    Args:
        results: from `load`.
        cells: the cells that are wanted.
        held_out: names of the held-out texts; the reference's test part is added to them.
    """
    return [cell for cell in cells if not _is_there(cell, results["cells"].get(cell.key), held_out)]


def _is_there(cell: Cell, entry: dict | None, held_out: Sequence[str]) -> bool:
    if entry is None:
        return False
    wanted = {*held_out, *([] if cell.tuning else [texts.TEST])}
    settings = resolved([*cell.flags, "--sparsity", cell.pattern], cell.nsamples)
    return wanted <= set(entry["perplexity"]) and settings.items() <= entry["arguments"].items()


def made_by(results: dict, cells: Sequence[Cell], commit: str, present: str) -> list[Cell]:
    """The cells in the results that a commit has made.

    Args:
        results: from `load`.
        cells: the cells to look at.
        commit: the commit's name or its beginning; ALL takes every commit.
        present: the present commit. Its cells are never taken, so that an interrupted study goes on.
    """
    commits = {cell: commit_of(results["cells"][cell.key]) for cell in cells if cell.key in results["cells"]}
    return [cell for cell, made in commits.items() if made != present and (commit == ALL or made.startswith(commit))]


def remaining(results: dict, to_run: Sequence[Cell], every: int) -> str:
    """How many cells are to be run, and how long they take by the seconds of those that are there.

    A cell takes the mean of its method's cells, at whatever pattern, in proportion to its calibration windows; one of a
    method without any takes the mean of all. Cells that shared a run have the seconds of their solve alone and are not
    looked at.

    Args:
        results: from `load`.
        to_run: the cells to run.
        every: number of all cells that were selected.
    """
    lines = [f"{len(to_run)} of {every} cells are to be run."]
    whole: dict[str, list[float]] = {}
    for entry in results["cells"].values():
        if "calibrate" in entry["seconds"]:
            whole.setdefault(entry["method"], []).append(sum(entry["seconds"].values()) / entry["nsamples"])
    if to_run and whole:
        means = {method: sum(seconds) / len(seconds) for method, seconds in whole.items()}
        overall = sum(means.values()) / len(means)
        hours = sum(cell.nsamples * means.get(cell.method, overall) for cell in to_run) / 3600
        lines.append(f"About {hours:.1f} hours, as fast as the cells that are there.")
        if unknown := list(dict.fromkeys(cell.method for cell in to_run if cell.method not in means)):
            lines.append(f"Of an average cell's time were taken: {', '.join(unknown)}.")
    return "\n".join(lines)
