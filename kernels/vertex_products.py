"""The products of one vertex after another on a CPU, most of them from an earlier one and what changed since.

    U = (lacks + W * (1 - V)) G = U' + (W * (V' - V)) G      U', V': the vertex before the last and its product

    W (rows, d) floating     V (rows, d) bool     U, lacks (rows, d) fp32     G (d, d) symmetric

Vertices settle, and until they do they zigzag: each is closer to the one before the last than to the last. In a solve
of 30 steps on SmolLM2-135M's layers at 60 % they change 3 to 4 times d entries a row in all, where 30 products from
scratch read 30 d. A row's sum runs over its own changes, in their order: it does not depend on the rows beside it.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .cpu import product, round_operand
from .topk_torch import as_float, keep

# The first products are from scratch, and then one of every so many. Early vertices differ so much that this costs
# little, and their products are many times the last ones: roundings of large numbers would stay in small ones.
FIRST, REFRESH = 4, 8

# Entries of G that are read at a time: columns of it that stay in a core's cache, however far the changed rows are
# apart; and the fewest columns that are worth a pass over the changes.
PANEL, NARROWEST = 1 << 18, 64


class VertexProducts:
    """U = (lacks + W * (1 - V)) G for one V after another.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        G: (d, d), symmetric, fp32 or bf16.
        lacks: (rows, d) fp32, what V has no part in; None: nothing.
        precision: of both operands, see `round_operand`.
    """

    def __init__(self, W: Tensor, G: Tensor, lacks: Tensor | None = None, *, precision: str = "ieee"):
        self._W, self._lacks, self._precision = W, lacks, precision
        self._G = round_operand(G, precision)
        self._made = 0
        # Two vertices with their products; the older one makes room for the next.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, V: Tensor, *, out: Tensor) -> Tensor:
        """The product of V, (rows, d) bool, written to `out`, (rows, d) fp32, and returned."""
        if self._made < FIRST or self._made % REFRESH == 0:
            E = keep(self._W, ~V)
            U = product(E if self._lacks is None else E + self._lacks, self._G, precision=self._precision)
            self._kept = [(V.clone(), U), (V.clone(), U.clone())]
        else:
            self._kept.reverse()
            before, U = self._kept[0]
            self._follow(before, V, U)
            before.copy_(V)
        self._made += 1
        return out.copy_(U)

    def _follow(self, before: Tensor, V: Tensor, U: Tensor) -> None:
        """Turn the product U of `before` into that of V."""
        d = V.shape[1]
        entries = np.flatnonzero((before ^ V).numpy())
        # Where each row's entries start, and where the last one's end.
        offsets = torch.from_numpy(entries.searchsorted(np.arange(len(V) + 1) * d))
        columns, entries = torch.from_numpy(entries % d), torch.from_numpy(entries)
        change = round_operand(self._W.take(entries), self._precision)
        # What V keeps is removed no more.
        change *= 1 - 2 * as_float(V.take(entries))
        panels = max(1, min(round(d * d / PANEL), d // NARROWEST))
        for panel, part in zip(self._G.chunk(panels, 1), U.chunk(panels, 1), strict=True):
            part += embedding_bag(
                columns, panel, offsets, mode="sum", per_sample_weights=change, include_last_offset=True
            )
