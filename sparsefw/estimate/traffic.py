"""Bytes that ranks send each other for a block: what `Ranks.sent` counts in a run, from shapes alone.

Pickled values, such as the errors of rows, are few bytes, and not counted.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from sparsefw.estimate.passes import reconstructed_parameters, steps_of_block
from sparsefw.estimate.sharing import Group, ShapeOfSolve, find_solves, groups, work_by_rank
from sparsefw.estimate.workload import PlannedRun, largest_share
from sparsefw.model.layers import is_watched
from sparsefw.model.shapes import BlockShape, LayerShape
from sparsefw.ranks import panels, sent_of_sum, sent_of_sum_at
from sparsefw.solver import PruneConfig, rows_by_rank
from sparsefw.solver.chunks import ROW_UNIT

# Bytes of an entry of Gram and cross matrices.
FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that are sent, by the kinds of `Ranks.sent`.

    Attributes:
        sum, sum_at: of each rank.
        spread: by rank.
    """

    sum: int
    sum_at: int
    spread: tuple[int, ...]

    def of_rank(self, number: int) -> dict[str, int]:
        """The bytes that a rank sends, by kind."""
        return {"sum": self.sum, "sum_at": self.sum_at, "spread": self.spread[number]}

    @property
    def most(self) -> dict[str, int]:
        """The most that a rank sends, by kind."""
        return {"sum": self.sum, "sum_at": self.sum_at, "spread": max(self.spread)}

    @property
    def waited(self) -> int:
        """Bytes that pass a link one after another. What one rank spreads, all others wait for."""
        return self.sum + self.sum_at + sum(self.spread)


def traffic(run: PlannedRun, block: BlockShape) -> Traffic:
    """The bytes that are sent for a block."""
    workload = run.workload
    steps = steps_of_block(block, workload, run.placement)
    return _traffic(block, workload.config, workload.ranks, run.shape.itemsize, steps)


@lru_cache(maxsize=256)
def _traffic(block: BlockShape, config: PruneConfig, ranks: int, itemsize: int, steps: int) -> Traffic:
    sent, spread = Counter[str](), [0] * ranks
    if ranks == 1:
        return Traffic(0, 0, (0,))
    for weights, _ in reconstructed_parameters(block, config.pattern):
        # The gradients of every step of a reconstruction.
        sent["sum"] += steps * sent_of_sum(itemsize * weights, ranks)
    for method in config.methods:
        for group in groups(block, config, method):
            compared = config.uses_dense_target and method == "sparsefw"
            for solves in find_solves(group, method, config, ranks):
                for kind, nbytes in [*_of_gram(solves, ranks), *(_of_crosses(solves, ranks) if compared else [])]:
                    sent[kind] += nbytes
                for solve in solves:
                    for number, rows in enumerate(_rows_spread(solve, ranks)):
                        spread[number] += rows * solve.layers[0].d * itemsize
    return Traffic(sent["sum"], sent["sum_at"], tuple(spread))


def _of_gram(solves: list[ShapeOfSolve], ranks: int) -> Iterator[tuple[str, int]]:
    """The Gram matrix of solves goes to their owner, or to all ranks."""
    for panel in panels(solves[0].layers[0].d):
        yield _sum(solves, (panel.stop - panel.start) * panel.stop, ranks)


def _sum(solves: list[ShapeOfSolve], entries: int, ranks: int) -> tuple[str, int]:
    """How entries are summed that these solves need, and the bytes that a rank sends for it."""
    owners = {solve.owner for solve in solves}
    if len(owners) == 1 and None not in owners:
        return "sum_at", sent_of_sum_at(FP32 * entries, ranks)
    return "sum", sent_of_sum(FP32 * entries, ranks)


def _of_crosses(solves: list[ShapeOfSolve], ranks: int) -> Iterator[tuple[str, int]]:
    """Cross matrices, see `target.Cross`: one of inputs goes to all, those with rows to the ranks that solve them."""
    layers = [layer for solve in solves for layer in solve.layers]
    if layers[0].experts:
        return
    d = layers[0].d
    watched = is_watched([layer.role for layer in layers])
    if not all(_has_rows(layer, watched) for layer in layers):
        yield _sum(solves, d * d, ranks)
    for solve in solves:
        parts = rows_by_rank([layer.rows for layer in solve.layers], ranks)
        for layer, rows_of_ranks in zip(solve.layers, parts, strict=True):
            if not _has_rows(layer, watched):
                continue
            pieces = [layer.rows] if solve.owner is not None else [rows.stop - rows.start for rows in rows_of_ranks]
            for rows in pieces:
                yield "sum_at", sent_of_sum_at(FP32 * rows * d, ranks)


def _has_rows(layer: LayerShape, watched: bool) -> bool:
    """Whether a layer has a cross matrix of its own, with its rows."""
    return watched or layer.role.way == "writes"


def _rows_spread(solve: ShapeOfSolve, ranks: int) -> list[int]:
    """The rows of a solve that each rank gives the others."""
    lengths = [layer.rows for layer in solve.layers]
    if solve.owner is not None:
        return [sum(lengths) * (number == solve.owner) for number in range(ranks)]
    by_layer = rows_by_rank(lengths, ranks)
    return [sum(rows.stop - rows.start for rows in of_rank) for of_rank in zip(*by_layer, strict=True)]


def imbalance(run: PlannedRun, block: BlockShape) -> dict[str, float]:
    """The largest share over the mean one: of "windows", of "rows" that are solved, of work on "whole" solves.

    Rows count by the work on them. What a block has none of is left out.
    """
    workload = run.workload
    most, all_of = Counter[str](windows=workload.windows_of_rank), Counter[str](windows=workload.windows)
    for method in workload.config.methods:
        for group in groups(block, workload.config, method):
            for kind, largest, total in _shares_of(group, method, workload.config, workload.ranks):
                most[kind] += largest
                all_of[kind] += total
    return {kind: most[kind] * workload.ranks / total for kind, total in all_of.items() if total}


def _shares_of(group: Group, method: str, config: PruneConfig, ranks: int) -> Iterator[tuple[str, int, int]]:
    """Kind, largest share and total of work that is shared out at once."""
    solves = [solve for of_gram in find_solves(group, method, config, ranks) for solve in of_gram]
    for solve in solves:
        if solve.owner is None:
            rows, d = sum(layer.rows for layer in solve.layers), solve.layers[0].d
            padded = -(-rows // ROW_UNIT) * ROW_UNIT
            yield "rows", largest_share(padded, ranks, ROW_UNIT) * d * d, rows * d * d
    work = work_by_rank(solves, ranks)
    yield "whole", max(work), sum(work)
