"""Divide the layers of a block into solves, and the solves among ranks.

Independent rows are divided evenly: every rank solves a part of the rows of every layer. An expert, or a layer whose
rows depend on each other, is solved by one rank, such that all ranks have about the same work. Every rank measures Gram
and cross matrices on its own windows. Before the solves, each rank gets the sums of the matrices that it needs. After
the solves, every rank has all weights.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.kernels.backend import Backend
from sparsefw.model.layers import Experts, Layer, is_expert, layer_of
from sparsefw.model.measure import Captured
from sparsefw.ranks import Handle, Ranks, balanced, shares
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import LayerResult, relative
from sparsefw.solver.stack import ROW_UNIT, places
from sparsefw.solver.targets import Cross


@dataclass
class Solve:
    """Layers of one dtype that read the same input and are solved together, as a stack.

    Attributes:
        layers: the layers.
        owner: the rank that solves all rows; None: the rows are divided among the ranks.
    """

    layers: list[Layer]
    owner: int | None = None

    @property
    def gram(self) -> str:
        """Return the name of the layers' Gram matrix."""
        return self.layers[0].gram

    @property
    def cost(self) -> int:
        """Estimate the work: flops of a product of all rows with the Gram matrix, and of a factorization of it."""
        d = self.layers[0].weight.shape[1]
        return sum(map(len, self.weights)) * d**2 + d**3

    @property
    def weights(self) -> list[Tensor]:
        """Return the weight of each layer."""
        return [layer.weight for layer in self.layers]

    def parts(self, ranks: Ranks) -> list[list[slice]]:
        """Divide the rows among the ranks: for each rank, the slice of its rows in each layer."""
        of_stack = shares(sum(map(len, self.weights)), ranks.count, ROW_UNIT)
        return [[rows for rows, _ in places(self.weights, part)] for part in of_stack]

    def rows(self, ranks: Ranks) -> list[slice]:
        """Return the rows of each layer that this rank solves. The solve must not have another rank as its owner."""
        return self.parts(ranks)[ranks.number] if self.owner is None else [slice(None)] * len(self.layers)


def find_solves(captured: Captured, method: str, config: PruneConfig, ranks: Ranks, experts: Experts) -> list[Solve]:
    """Group the layers of a block into solves, in the order in which the block uses them; `experts` as for `kind_of`.

    Each layer whose rows depend on each other is a solve by itself.
    """
    alike: dict[tuple[str, torch.dtype], list[Layer]] = defaultdict(list)
    for layer in captured.layers:
        alike[layer.gram, layer.weight.dtype].append(layer)
    together = list(alike.values())
    if not config.rows_independent(method):
        together = [[layer] for layers in together for layer in layers]
    rows_shared = config.rows_shared(method)
    solves = [Solve(layers) for layers in together]
    undivided = [solve for solve in solves if not rows_shared or is_expert(solve.gram, experts)]
    for solve, owner in zip(undivided, balanced([solve.cost for solve in undivided], ranks.count), strict=True):
        solve.owner = owner
    return solves


def combine(block: nn.Module, captured: Captured, ranks: Ranks, experts: Experts) -> Captured:
    """Add the layers that only other ranks have seen, with Gram matrices of zeros; `experts` as for `kind_of`.

    A router sends each token to few experts, so ranks may see different experts.

    Raises:
        InputError: ranks differ in a layer that is not an expert.
    """
    if ranks.alone:
        return captured
    # For each layer: its Gram matrix, the kind of its cross matrix, the weight's shape, and whether it is transposed.
    own_layers = {layer.name: layer for layer in captured.layers}
    of = {name: cross.of for name, cross in captured.crosses.items()}
    seen = ranks.gather({name: (x.gram, of.get(name), x.weight.shape, x.transposed) for name, x in own_layers.items()})
    descriptions = {name: description for layers in seen for name, description in layers.items()}
    for name, description in descriptions.items():
        if not is_expert(name, experts) and any(layers.get(name) != description for layers in seen):
            raise InputError(f"{name}: unsupported model: windows on other ranks use it differently; use one rank")
    layers = [
        own_layers.get(name) or layer_of(block, name, gram, shape, transposed)
        for name, (gram, _, shape, transposed) in descriptions.items()
    ]
    for layer in layers:
        if layer.gram not in captured.grams:
            d = layer.weight.shape[1]
            captured.grams[layer.gram] = torch.zeros(d, d, dtype=torch.float32, device=layer.weight.device)
    return replace(captured, layers=layers)


def add_up(captured: Captured, solves: list[Solve], ranks: Ranks, backend: Backend) -> dict[str, list[Handle]]:
    """Sum Gram and cross matrices over all ranks, in place, on the ranks that need them.

    Other ranks drop the Gram matrices that they do not need.

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


def _add_up_crosses(captured: Captured, solves: list[Solve], ranks: Ranks) -> dict[str, list[Handle]]:
    """Begin to sum the cross matrices. If rows are divided among ranks, each rank gets the sums of its own rows."""
    begun: dict[int, list[Handle]] = {}
    handles: dict[str, list[Handle]] = {}
    for solve in solves:
        parts = zip(*solve.parts(ranks), strict=True)
        for layer, rows_of_ranks in zip(solve.layers, parts, strict=True):
            cross = captured.crosses.get(layer.name)
            if cross is None:
                continue
            matrix = cross.matrix
            # Layers with the same input may have the same cross matrix, and different owners.
            if id(matrix) not in begun:
                owners = {other.owner for other in solves if other.gram == solve.gram}
                if solve.owner is not None and (len(owners) == 1 or cross.of != "inputs"):
                    begun[id(matrix)] = [ranks.reduce(solve.owner, matrix)]
                elif cross.of == "inputs":
                    begun[id(matrix)] = [ranks.all_reduce(matrix)]
                else:
                    begun[id(matrix)] = [ranks.reduce(n, matrix[rows]) for n, rows in enumerate(rows_of_ranks)]
            handles[layer.name] = begun[id(matrix)]
    return handles


def rows_of(cross: Cross | None, rows: slice) -> Cross | None:
    """Select some rows of a layer's cross matrix. The matrix of "inputs" is for all rows, and returned unchanged."""
    return Cross(cross.of, cross.matrix[rows]) if cross and cross.of != "inputs" else cross


def exchange_rows(solve: Solve, results: list[LayerResult], ranks: Ranks) -> list[LayerResult]:
    """Send the rows that each rank has solved to all ranks.

    Args:
        solve: the solve. If it has an owner, nothing is sent here: `exchange` sends its weights later.
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
    """Join the results of a layer's parts. Ranks solve them at the same time, so seconds are the parts' mean."""
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
    """Send the weights of all solves that have an owner from the owner to all ranks.

    Args:
        solves: the solves of a stage.
        results: the results of this rank's solves, by the name of the layer in its block.
        ranks: the ranks.

    Returns:
        The results of all solves.
    """
    undivided = [(solve.owner, layer) for solve in solves if solve.owner is not None for layer in solve.layers]
    if not undivided:
        return results
    for owner, layer in undivided:
        weight = layer.weight.contiguous()
        ranks.broadcast(owner, weight).wait()
        if owner != ranks.number:
            layer.weight.copy_(weight)
    own_results = {layer.name: results[layer.name] for owner, layer in undivided if owner == ranks.number}
    return results | {name: result for of_rank in ranks.gather(own_results) for name, result in of_rank.items()}
