"""The claims of report.json about the checkpoint beside it: which layers were pruned, and how much each may keep."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefw.checks.tasks import check_tasks
from sparsefw.data import BATCHES
from sparsefw.errors import InputError, shown
from sparsefw.report import Report, read_report
from sparsefw.solver import METHODS, LayerResult, Pattern, patterns


@dataclass(frozen=True)
class Claims:
    """The claims of a report about the checkpoint that was written.

    Attributes:
        model: the source, as `--model` named it.
        method: the method whose weights were written.
        pattern: sparsity pattern.
        scope: what one budget covers: "row", "layer" or "group"; never "row" for a method whose rows share a budget.
        refits: whether kept weights were changed.
        keeps_zeros: whether weights that are zero in the source were to stay zero.
        layers: results of the pruned layers by name.
        kept_dense: names of the matrices inside the blocks that were not pruned.
        on_batches: whether a model in memory was pruned on batches.
        in_memory: whether the model was in memory; older versions say it only of batches.
    """

    model: str
    method: str
    pattern: Pattern
    scope: str
    refits: bool
    keeps_zeros: bool
    layers: dict[str, LayerResult]
    kept_dense: set[str]
    on_batches: bool
    in_memory: bool

    def kept_in(self, layer: LayerResult) -> int:
        """Weights that a layer keeps under the pattern."""
        rows, d = layer.shape
        if self.scope == "layer":
            return patterns.kept_in_layer(self.pattern, rows, d)
        return rows * patterns.kept_in_row(self.pattern, d)

    def kept_in_parts(self, layer: LayerResult) -> tuple[int, Tensor]:
        """The parts of a layer with a budget each: rows, groups, or the whole matrix.

        Returns:
            The number of weights in a part, which follow each other, and how many of them each part keeps, int64
            (parts,).
        """
        rows, d = layer.shape
        if self.scope == "layer":
            return rows * d, torch.tensor([self.kept_in(layer)])
        if self.scope == "group":
            m = self.pattern.group
            return m, torch.tensor(patterns.kept_in_group(self.pattern)).expand(rows * d // m)
        return d, torch.tensor(patterns.kept_in_row(self.pattern, d)).expand(rows)

    def part_name(self, layer: LayerResult, n: int) -> str:
        """The n-th of the parts in `kept_in_parts`, in words."""
        if self.scope == "layer":
            return "the matrix"
        if self.scope == "row":
            return f"row {n}"
        row, first = divmod(n * self.pattern.group, layer.shape[1])
        return f"row {row}, columns {first} to {first + self.pattern.group - 1}"


def read_claims(path: Path) -> Claims:
    """Read report.json.

    Raises:
        InputError: it is missing, not what `sparsefw.run` writes, or contradicts itself.
    """
    report = read_report(path)
    try:
        return claims_of(report)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def claims_of(report: Report) -> Claims:
    """The claims of a report.

    Raises:
        InputError: it contradicts itself; the message begins with the place in the report.
    """
    method = report.method
    if method not in METHODS:
        raise InputError(f"arguments.method: no such method: {shown(method)}")
    try:
        pattern = patterns.parse(report.argument("sparsity", str))
    except InputError as error:
        raise InputError(f"arguments.sparsity: {error}") from error
    layers: dict[str, LayerResult] = {}
    for n, layer in enumerate(report.layers):
        # Layers of other methods describe other weights.
        if layer.method == method:
            if layer.name in layers:
                raise InputError(f"layers[{n}].name: a second row of {shown(layer.name)}")
            _check_layer(layer, pattern, f"layers[{n}]")
            layers[layer.name] = layer
    if not layers:
        raise InputError(f"layers: none of them pruned by {method}, the method that arguments name")
    if report.tasks:
        check_tasks(report.tasks, report.methods)
    return Claims(
        model=report.argument("model", str),
        method=method,
        pattern=pattern,
        scope="layer" if pattern.scope == "row" and not METHODS[method].rows_independent else pattern.scope,
        # One-shot masks leave weights as they are, SparseGPT never does.
        refits=method == "sparsegpt"
        or (method == "sparsefw" and report.argument("refit", int) > 0)
        # Older versions reconstructed nothing.
        or ("reconstruct" in report.arguments and report.argument("reconstruct", int) > 0),
        keeps_zeros=report.argument("keep_zeros", bool),
        layers=layers,
        kept_dense=set(report.kept_dense),
        on_batches=_datasets(report) == (BATCHES,),
        in_memory=report.in_memory,
    )


def _datasets(report: Report) -> tuple[str, ...]:
    """The calibration texts. Older versions had one."""
    if isinstance(report.arguments.get("dataset"), str):
        return (report.argument("dataset", str),)
    return report.argument("dataset", tuple)


def _check_layer(layer: LayerResult, pattern: Pattern, place: str) -> None:
    """Refuse a layer that cannot have been pruned with this pattern; `place` is its place in the report."""
    rows, d = layer.shape
    if rows <= 0 or d <= 0:
        raise InputError(f"{place}.shape: expected two whole numbers above 0")
    if not 0 <= layer.kept <= rows * d:
        raise InputError(f"{place}.kept: {layer.kept}, of {rows} x {d} weights")
    if layer.pattern != pattern.text:
        raise InputError(f"{place}.pattern: {shown(layer.pattern)}, but arguments have sparsity {pattern.text}")
    try:
        patterns.check_width(pattern, d, "shape")
    except InputError as error:
        raise InputError(f"{place}.{error}") from error
