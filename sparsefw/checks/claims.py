"""What report.json claims of the checkpoint beside it: which layers were pruned, and how much each may keep."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefw.errors import InputError, first_line
from sparsefw.solver import patterns
from sparsefw.solver.methods import METHODS
from sparsefw.solver.patterns import Pattern


@dataclass(frozen=True)
class Row:
    """What the report says of a pruned layer, see `prune.LayerResult`."""

    shape: tuple[int, int]
    transposed: bool
    kept: int


@dataclass(frozen=True)
class Claims:
    """What report.json says of the checkpoint that was written.

    Attributes:
        model: the source, as `--model` named it.
        method: that chose what was written.
        pattern: sparsity pattern.
        scope: what one budget covers: "row", "layer" or "group"; never "row" for a method whose rows share a budget.
        refits: whether kept weights were changed.
        layers: the pruned ones by name.
        dense: names of the matrices inside the blocks that were not pruned.
    """

    model: str
    method: str
    pattern: Pattern
    scope: str
    refits: bool
    layers: dict[str, Row]
    dense: set[str]

    def kept(self, row: Row) -> int:
        """Weights that a layer keeps under the pattern."""
        rows, d = row.shape
        if self.scope == "layer":
            return patterns.kept_in_layer(self.pattern, rows, d)
        return rows * patterns.kept_in_row(self.pattern, d)

    def budgets(self, row: Row) -> tuple[int, Tensor]:
        """The parts of a layer that have a budget of their own: rows, groups, or the whole.

        Returns:
            Consecutive weights in a part, and what each part may keep, int64 (parts,).
        """
        rows, d = row.shape
        if self.scope == "layer":
            return rows * d, torch.tensor([self.kept(row)])
        if self.scope == "group":
            m = self.pattern.group
            return m, torch.tensor(patterns.kept_in_group(self.pattern)).expand(rows * d // m)
        return d, torch.tensor(patterns.kept_in_row(self.pattern, d)).expand(rows)

    def part(self, row: Row, n: int) -> str:
        """The n-th of these parts, in words."""
        if self.scope == "layer":
            return "the matrix"
        if self.scope == "row":
            return f"row {n}"
        start = n * self.pattern.group
        at, first = divmod(start, row.shape[1])
        return f"row {at}, columns {first} to {first + self.pattern.group - 1}"


def read_claims(path: Path) -> Claims:
    """Read report.json, and check that it is one.

    Raises:
        InputError: it is missing, not JSON, contradicts itself, or is not what `sparsefw.run` writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: not readable ({first_line(error)}); give a folder that sparsefw.run wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); prune again for a whole one") from error
    arguments, where = _of(content, "arguments", dict, path), f"{path}: arguments"
    method = _of(arguments, "method", str, where)
    if method not in METHODS:
        raise InputError(f"{where}: method: no such method: {method}")
    try:
        pattern = patterns.parse(_of(arguments, "sparsity", str, where))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    dense = _of(content, "kept_dense", list, path)
    if not all(type(name) is str for name in dense):
        raise InputError(f"{path}: kept_dense: expected names")
    layers: dict[str, Row] = {}
    for n, row in enumerate(_of(content, "layers", list, path)):
        where = f"{path}: layers[{n}]"
        # Rows of other methods describe other weights.
        if _of(row, "method", str, where) == method:
            name = _of(row, "name", str, where)
            if name in layers:
                raise InputError(f"{where}: name: a second row of {name}")
            layers[name] = _row(row, pattern, where)
    if not layers:
        raise InputError(f"{path}: layers: none of them pruned by {method}, the method that arguments name")
    return Claims(
        model=_of(arguments, "model", str, f"{path}: arguments"),
        method=method,
        pattern=pattern,
        scope="layer" if pattern.scope == "row" and not METHODS[method].by_rows else pattern.scope,
        # One-shot masks leave weights as they are, SparseGPT never does.
        refits=method == "sparsegpt"
        or (method == "sparsefw" and _of(arguments, "refit", int, f"{path}: arguments") > 0),
        layers=layers,
        dense=set(dense),
    )


def _row(row: dict, pattern: Pattern, where: str) -> Row:
    shape, kept = _of(row, "shape", list, where), _of(row, "kept", int, where)
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise InputError(f"{where}: shape: expected two whole numbers above 0")
    rows, d = shape
    if not 0 <= kept <= rows * d:
        raise InputError(f"{where}: kept: {kept}, of {rows} x {d} weights")
    if (text := _of(row, "pattern", str, where)) != pattern.text:
        raise InputError(f"{where}: pattern: {text}, but arguments have sparsity {pattern.text}")
    try:
        patterns.check_width(pattern, d, "shape")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return Row((rows, d), _of(row, "transposed", bool, where), kept)


def _of(holder: Any, key: str, kind: type, where: object) -> Any:
    """The value of a key, which has to be of this kind: no subclass, True is not a number."""
    if type(holder) is not dict:
        raise InputError(f"{where}: expected an object, got {type(holder).__name__}")
    if key not in holder:
        raise InputError(f"{where}: {key}: missing; prune again with this version of sparsefw")
    if type(holder[key]) is not kind:
        raise InputError(f"{where}: {key}: expected {kind.__name__}, got {type(holder[key]).__name__}")
    return holder[key]
