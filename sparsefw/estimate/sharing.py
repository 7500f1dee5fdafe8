"""How the solves of a block are shared out over ranks: what `driver.solves` does, from shapes alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from sparsefw.estimate.passes import stages
from sparsefw.model.shapes import BlockShape, LayerShape
from sparsefw.ranks import balanced
from sparsefw.solver import PruneConfig, cost_of_solve

# Layers that are measured at once, by the input that they read.
Group = tuple[tuple[LayerShape, ...], ...]


@dataclass(frozen=True)
class ShapeOfSolve:
    """Layers that read one input and are solved together; of an expert, the matrices of one.

    Attributes:
        layers: the layers.
        owner: the rank that solves them; None: each rank solves its rows.
    """

    layers: tuple[LayerShape, ...]
    owner: int | None = None

    @property
    def cost(self) -> int:
        """See `cost_of_solve`."""
        return cost_of_solve(sum(layer.rows for layer in self.layers), self.layers[0].d)


def approximates_dense(config: PruneConfig, method: str) -> bool:
    """Whether a method's layers approximate the dense model's outputs, see `target`; those of others do not."""
    return config.uses_dense_target and method == "sparsefw"


def groups(block: BlockShape, config: PruneConfig, method: str) -> list[Group]:
    """The stages of a block by what is measured at once: one by one, or all of them. No group is empty."""
    order = tuple(map(tuple, stages(block.layers)))
    if approximates_dense(config, method):
        return [(stage,) for stage in order]
    return [order] if order else []


def find_solves(group: Group, method: str, config: PruneConfig, ranks: int) -> list[list[ShapeOfSolve]]:
    """The solves of layers that are measured at once, in a list for each Gram matrix. Tokens reach all experts."""
    together = [stage for stage in group for _ in range(max(1, stage[0].experts))]
    if ranks == 1:
        return [[ShapeOfSolve(layers)] for layers in together]
    apart = not config.rows_independent(method)
    solves = [[ShapeOfSolve((x,)) for x in layers] if apart else [ShapeOfSolve(layers)] for layers in together]
    rows_shared = config.rows_shared(method)
    whole = [
        (n, m)
        for n, of_gram in enumerate(solves)
        for m in range(len(of_gram))
        if not rows_shared or of_gram[m].layers[0].experts
    ]
    for (n, m), owner in zip(whole, balanced([solves[n][m].cost for n, m in whole], ranks), strict=True):
        solves[n][m] = ShapeOfSolve(solves[n][m].layers, owner)
    return solves


def work_by_rank(solves: Iterable[ShapeOfSolve], ranks: int) -> list[int]:
    """The cost of the solves that each rank does as a whole."""
    work = [0] * ranks
    for solve in solves:
        if solve.owner is not None:
            work[solve.owner] += solve.cost
    return work


def solves_of_rank(group: Group, method: str, config: PruneConfig, ranks: int) -> Counter[ShapeOfSolve]:
    """The solves of the rank that has the most to do, and how many of each."""
    solves = [solve for of_gram in find_solves(group, method, config, ranks) for solve in of_gram]
    work = work_by_rank(solves, ranks)
    busiest = work.index(max(work))
    return Counter(solve for solve in solves if solve.owner in (None, busiest))


@lru_cache(maxsize=256)
def grams_of_rank(group: Group, config: PruneConfig, ranks: int) -> list[int]:
    """For each stage of a group, the most Gram matrices that a rank has once they are summed, by any method."""
    return [max(_kept_grams(stage, group, method, config, ranks) for method in config.methods) for stage in group]


def _kept_grams(stage: tuple[LayerShape, ...], group: Group, method: str, config: PruneConfig, ranks: int) -> int:
    everywhere, owned = 0, Counter[int]()
    for solves in find_solves(group, method, config, ranks):
        owners = {solve.owner for solve in solves}
        if solves[0].layers[0].gram != stage[0].gram:
            continue
        (owner,) = owners if len(owners) == 1 else (None,)
        if owner is None:
            # Every rank needs it, or several do.
            everywhere += 1
        else:
            owned[owner] += 1
    return everywhere + max(owned.values(), default=0)
