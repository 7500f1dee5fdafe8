"""Make the tables of the quality study from its results file."""

import math
from collections.abc import Iterable
from itertools import product
from statistics import linear_regression
from typing import Any

from quality import CURVE, DETAILED, DETAILS, HALVES, PREDICTED, ROWS, SPARSITIES
from report import plain

Cell = dict[str, Any]
# Cells by the name of a row and a sparsity: "Wanda | 0.6".
Cells = dict[str, Cell]

NAMES = {"wiki_test": "Wikipedia", "reference": "language reference"}


def table(cells: Cells, sparsity: str = DETAILED, rows: Iterable[str] = (*ROWS, *DETAILS)) -> str:
    """Write a line for each row that is measured at this sparsity."""
    return _lines(cells, {row: f"{row} | {sparsity}" for row in rows})


def by_text(cells: Cells) -> str:
    """Write the perplexity of every text, at DETAILED."""
    lines = [["", *(NAMES.get(name, name.partition("_")[2]) for name in cells["dense"]["perplexity"])]]
    for row in ("dense", *ROWS, *DETAILS):
        if cell := cells.get(row) or cells.get(f"{row} | {DETAILED}"):
            lines.append([row, *(f"{figure:.1f}" for figure in cell["perplexity"].values())])
    return plain(lines)


def curve(cells: Cells) -> str:
    """Write the rows of CURVE, each after the row that it starts from."""
    keys = {}
    for sparsity, row in product(SPARSITIES, CURVE):
        if f"{row} | {sparsity}" in cells:
            keys |= {f"{name}, {sparsity}": f"{name} | {sparsity}" for name in (row.partition(" + ")[0], row)}
    return _lines(cells, keys)


def predictions(cells: Cells) -> str:
    """Predict ratios of far texts after recoveries on more tokens, from those of the curve.

    They are a tokens^-b in their logarithms: a line, by least squares, if tokens have a logarithm, too.
    """
    points, lines = {}, [["", *(f"{tokens:,}" for tokens in PREDICTED)]]
    for key, cell in cells.items():
        start, more, tokens = key.partition(" | ")[0].partition(" + ")
        if more:
            point = math.log(int(tokens.replace(",", ""))), math.log(math.log(cell["ratio"]))
            points.setdefault(f"{start}, {key.partition(' | ')[2]}", []).append(point)
    for name, found in points.items():
        if len(found) > 2:
            slope, at_one = linear_regression(*zip(*found, strict=True))
            ratios = (math.exp(math.exp(slope * math.log(tokens) + at_one)) for tokens in PREDICTED)
            lines.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
    return plain(lines)


def _lines(cells: Cells, keys: dict[str, str]) -> str:
    """Write the dense model and the cells of these keys, by their names in the table, and what made them."""
    found = {"dense": cells["dense"]} | {name: cells[key] for name, key in keys.items() if key in cells}
    near = [text for text in cells["dense"]["perplexity"] if not text.startswith(HALVES)]
    lines = [["", "done", *(NAMES.get(text, text) for text in near), "far", "tasks lose, %", "CPU s", "error"]]
    for name, cell in found.items():
        costs = cell["commands"].values()
        lines.append(
            [
                name,
                cell["done"],
                *(f"{cell['perplexity'][text]:.1f}" for text in near),
                f"{cell['ratio']:.2f}",
                " ± ".join(f"{100 * share:.1f}" for share in cell["lost"]),
                f"{sum(costs):,.0f}" if costs and None not in costs else "",
                f"{cell['error']:.3f}" if "error" in cell else "",
            ]
        )
    machines = [cell["machine"] for cell in found.values() if "machine" in cell]
    of = {name: "; ".join(sorted({machine[name] for machine in machines})) for name in ("commit", "cpu", "torch")}
    return f"{plain(lines)}\nBy commit {of['commit']}, on one thread of {of['cpu']}, torch {of['torch']}.\n"
