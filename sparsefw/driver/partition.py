"""Divide the layers of a block into solves, and the solves among ranks.

Rows that do not depend on each other are divided evenly: every rank solves its rows of every layer. An expert, or a
layer whose rows share a budget, is solved by one rank; costs decide by which. Every rank has measured matrices on its
own windows: they are summed before the solves, where they are needed. After the solves every rank has all weights.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.kernels.backend import Backend
from sparsefw.model.layers import Layer, is_expert, layer_of
from sparsefw.model.measure import Captured
from sparsefw.ranks import Handle, Ranks, balanced, shares
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import LayerResult, relative
from sparsefw.solver.stack import ROW_UNIT, places
from sparsefw.solver.targets import Cross


@dataclass(frozen=True)
class Solve:
    """Layers of one dtype that read one input and are solved together: a stack.

    Attributes:
        layers: the layers.
        owner: the rank that solves them; None: each rank solves its rows.
    """

    layers: list[Layer]
    owner: int | None = None

    @property
    def gram(self) -> str:
        """The name of their Gram matrix."""
        return self.layers[0].gram

    @property
    def cost(self) -> int:
        """Flops of a product of the rows and of a factorization of the Gram matrix, by which ranks share solves."""
        d = self.layers[0].weight.shape[1]
        return sum(map(len, self.weights)) * d**2 + d**3

    @property
    def weights(self) -> list[Tensor]:
        """The weight of each layer."""
        return [layer.weight for layer in self.layers]

    def parts(self, ranks: Ranks) -> list[list[slice]]:
        """The rows of each layer that each rank solves where ranks share rows, by rank."""
        of_stack = shares(sum(map(len, self.weights)), ranks.count, ROW_UNIT)
        return [[rows for rows, _ in places(self.weights, part)] for part in of_stack]

    def rows(self, ranks: Ranks) -> list[slice]:
        """The rows of each layer that this rank solves. The solve must not belong to another rank."""
        return self.parts(ranks)[ranks.number] if self.owner is None else [slice(None)] * len(self.layers)


def find_solves(
    captured: Captured, method: str, config: PruneConfig, ranks: Ranks, experts: frozenset[str]
) -> list[Solve]:
    """Group the layers of a block into solves, in the order in which the block uses them; `experts` as for `kind_of`.

    A layer whose rows depend on each other has a solve of its own.
    """
    alike: dict[tuple[str, torch.dtype], list[Layer]] = defaultdict(list)
    for layer in captured.layers:
        alike[layer.gram, layer.weight.dtype].append(layer)
    together = list(alike.values())
    if not config.rows_independent(method):
        together = [[layer] for layers in together for layer in layers]
    rows_shared = config.rows_shared(method)
    solves = [Solve(layers) for layers in together]
    whole = [n for n, solve in enumerate(solves) if not rows_shared or is_expert(solve.gram, experts)]
    for n, owner in zip(whole, balanced([solves[n].cost for n in whole], ranks.count), strict=True):
        solves[n] = Solve(solves[n].layers, owner)
    return solves


def combine(block: nn.Module, captured: Captured, ranks: Ranks, experts: frozenset[str]) -> Captured:
    """Add the layers that other ranks have seen, with matrices of zeros.

    A router sends a token to few experts, so that ranks may see different ones; `experts` as for `kind_of`.

    Raises:
        InputError: ranks differ in a layer that is no expert.
    """
    if ranks.alone:
        return captured
    # Ranks must agree on the matrices that were measured, the weight's shape, and whether it is transposed.
    mine = {layer.name: layer for layer in captured.layers}
    of = {name: cross.of for name, cross in captured.crosses.items()}
    seen = ranks.gather(
        {name: (x.gram, of.get(name), (len(x.weight), x.weight.shape[1]), x.transposed) for name, x in mine.items()}
    )
    forms = {name: form for layers in seen for name, form in layers.items()}
    for name, form in forms.items():
        if not is_expert(name, experts) and any(layers.get(name) != form for layers in seen):
            raise InputError(f"{name}: unsupported model: windows on other ranks use it in another way")
    layers = [
        mine.get(name) or layer_of(block, name, gram, shape, transposed)
        for name, (gram, _, shape, transposed) in forms.items()
    ]
    grams = dict(captured.grams)
    for layer in layers:
        if layer.gram not in grams:
            d = layer.weight.shape[1]
            grams[layer.gram] = torch.zeros(d, d, dtype=torch.float32, device=layer.weight.device)
    return Captured(layers, grams, captured.crosses, captured.ignored)


def add_up(captured: Captured, solves: list[Solve], ranks: Ranks, backend: Backend) -> dict[str, Handle]:
    """Sum the matrices over all ranks, in place, on the ranks that need them. The other ranks drop them.

    Returns:
        Handles of the transfers of cross matrices, by layer. A transfer may still be running.
    """
    handles = _add_up_crosses(captured, solves, ranks)
    for gram in dict.fromkeys(solve.gram for solve in solves):
        owners = {solve.owner for solve in solves if solve.gram == gram}
        (owner,) = owners if len(owners) == 1 else (None,)
        ranks.reduce_triangle(captured.grams[gram], owner)
        if owner is None or ranks.number == owner:
            backend.mirror_lower(captured.grams[gram])
        else:
            del captured.grams[gram]
    return handles


def _add_up_crosses(captured: Captured, solves: list[Solve], ranks: Ranks) -> dict[str, Handle]:
    """Begin to sum the cross matrices. Where ranks share rows, each rank gets the sums of its own rows alone."""
    begun: dict[int, Handle] = {}
    handles: dict[str, Handle] = {}
    for solve in solves:
        parts = zip(*solve.parts(ranks), strict=True)
        for layer, rows_of_ranks in zip(solve.layers, parts, strict=True):
            cross = captured.crosses.get(layer.name)
            if cross is None:
                continue
            matrix = cross.matrix
            # Layers that read one input may share a cross matrix, and belong to different ranks.
            if id(matrix) not in begun:
                owners = {other.owner for other in solves if other.gram == solve.gram}
                if solve.owner is not None and (len(owners) == 1 or cross.of != "inputs"):
                    begun[id(matrix)] = ranks.reduce(solve.owner, matrix)
                elif cross.of == "inputs":
                    begun[id(matrix)] = ranks.all_reduce(matrix)
                else:
                    begun[id(matrix)] = Handle.of_all(
                        ranks.reduce(n, matrix[rows]) for n, rows in enumerate(rows_of_ranks)
                    )
            handles[layer.name] = begun[id(matrix)]
    return handles


def rows_of(cross: Cross | None, rows: slice) -> Cross | None:
    """Select some rows of a layer's cross matrix. A cross matrix of inputs is the same for all rows."""
    return Cross(cross.of, cross.matrix[rows]) if cross and cross.of != "inputs" else cross


def exchange_rows(solve: Solve, results: list[LayerResult], ranks: Ranks) -> list[LayerResult]:
    """Send the rows that each rank has solved to all ranks.

    Args:
        solve: the solve. If it belongs to one rank, `exchange` sends its weights later.
        results: the results of this rank's rows of each layer.
        ranks: the ranks.

    Returns:
        The results of the layers.
    """
    if solve.owner is not None or ranks.alone:
        return results
    for owner, rows_of_layers in enumerate(solve.parts(ranks)):
        parts = [weight[rows] for weight, rows in zip(solve.weights, rows_of_layers, strict=True)]
        chosen = torch.cat(parts)
        ranks.broadcast(owner, chosen).wait()
        for part, rows in zip(parts, chosen.split([len(part) for part in parts]), strict=True):
            part.copy_(rows)
    return [_joined(parts) for parts in zip(*ranks.gather(results), strict=True)]


def _joined(parts: tuple[LayerResult, ...]) -> LayerResult:
    """Make the result of a layer from those of its parts. Ranks solved them at the same time: seconds are the mean."""
    warm, mask, error = (
        sum(getattr(part, name) for part in parts) for name in ("error_warm_start", "error_mask", "error")
    )
    gaps = [part.gap for part in parts if part.gap is not None]
    return replace(
        parts[0],
        shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
        kept=sum(part.kept for part in parts),
        error_warm_start=warm,
        error_mask=mask,
        error=error,
        relative_mask=relative(mask, warm),
        relative_error=relative(error, warm),
        gap=sum(gaps) if len(gaps) == len(parts) else None,
        seconds=sum(part.seconds for part in parts) / len(parts),
    )


def exchange(solves: list[Solve], results: dict[str, LayerResult], ranks: Ranks) -> dict[str, LayerResult]:
    """Send the weights of solves that belong to one rank to all ranks.

    Args:
        solves: the solves of a stage.
        results: the results of this rank's solves, by the name of the layer in its block.
        ranks: the ranks.

    Returns:
        The results of all solves.
    """
    whole = [(solve.owner, layer) for solve in solves if solve.owner is not None for layer in solve.layers]
    if not whole:
        return results
    for owner, layer in whole:
        weight = layer.weight.contiguous()
        ranks.broadcast(owner, weight).wait()
        if owner != ranks.number:
            layer.weight.copy_(weight)
    mine = {layer.name: results[layer.name] for owner, layer in whole if owner == ranks.number}
    return results | {name: result for chosen in ranks.gather(mine) for name, result in chosen.items()}
