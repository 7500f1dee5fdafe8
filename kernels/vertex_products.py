"""Products of successive vertices on a CPU, most of them computed from an earlier product and the changed entries.

    U = (target_gap + W * (1 - V)) G = U' + (W * (V' - V)) G      U', V': the vertex before the last and its product

    W (rows, d) floating     V (rows, d) bool     U, target_gap (rows, d) fp32     G (d, d) symmetric

Vertices settle, and until then they zigzag: each is closer to the vertex before the last than to the last. In a solve
of 30 steps on SmolLM2-135M's layers at 60 % they change 3 to 4 times d entries a row in all, while 30 products from
scratch read 30 d. A row's sum runs over its own changes in their order, so it does not depend on the rows beside it.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .cpu import product, round_operand
from .topk_torch import as_float, masked

# The first FIRST products are computed from scratch, and then one of every REFRESH. Early vertices differ so much that
# this costs little. Their products are also many times larger than the last ones, whose changes would keep the rounding
# errors of large numbers.
FIRST, REFRESH = 4, 8

# PANEL: entries of G read at a time, a panel of its columns that stays in a core's cache however far apart the changed
# rows are. NARROWEST: the fewest columns of a panel that are worth a pass over the changes.
PANEL, NARROWEST = 1 << 18, 64


class VertexProducts:
    """U = (target_gap + W * (1 - V)) G for one V after another.

    Args:
        W: (rows, d), fp32 / bf16 / fp16.
        G: (d, d), symmetric, fp32 or bf16.
        target_gap: (rows, d) fp32, the target minus W; None where the target is W.
        precision: rounding of both operands, see `cpu.round_operand`.
    """

    def __init__(self, W: Tensor, G: Tensor, target_gap: Tensor | None = None, *, precision: str = "ieee"):
        self._W, self._target_gap, self._precision = W, target_gap, precision
        self._G = round_operand(G, precision)
        self._made = 0
        # The last two vertices with their products. The next one replaces the older.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, V: Tensor, *, out: Tensor) -> Tensor:
        """The product of V (rows, d) bool, written to `out` (rows, d) fp32 and returned."""
        if self._made < FIRST or self._made % REFRESH == 0:
            E = masked(self._W, ~V)
            U = product(E if self._target_gap is None else E + self._target_gap, self._G, precision=self._precision)
            self._kept = [(V.clone(), U), (V.clone(), U.clone())]
        else:
            self._kept.reverse()
            before, U = self._kept[0]
            self._follow(before, V, U)
            before.copy_(V)
        self._made += 1
        return out.copy_(U)

    def _follow(self, before: Tensor, V: Tensor, U: Tensor) -> None:
        """Turn U, the product of `before`, into the product of V."""
        d = V.shape[1]
        positions = np.flatnonzero((before ^ V).numpy())
        # The offsets at which the entries of each row start, and the end of the last row.
        offsets = torch.from_numpy(positions.searchsorted(np.arange(len(V) + 1) * d))
        columns, entries = torch.from_numpy(positions % d), torch.from_numpy(positions)
        change = round_operand(self._W.take(entries), self._precision)
        # An entry that V keeps is no longer removed.
        change *= 1 - 2 * as_float(V.take(entries))
        panels = max(1, min(round(d * d / PANEL), d // NARROWEST))
        for panel, part in zip(self._G.chunk(panels, 1), U.chunk(panels, 1), strict=True):
            part += embedding_bag(
                columns, panel, offsets, mode="sum", per_sample_weights=change, include_last_offset=True
            )
