"""round_mask: choose the binary mask of the highest entries of a relaxed mask M, by two selections.

    first  = lmo(M)
    lowest = the lowest M among the entries of a row (or group) in `first`
    order  = saliency + side,  side = the greatest fp32 value if M > lowest, minus this value if M < lowest, else 0
    mask   = lmo(order)

    M, saliency, order (rows, d) fp32     first, mask (rows, d) bool

So ties in M go to the higher saliency.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .plain import lowest, row_blocks


def round_mask(lmo: Callable[..., Tensor], M: Tensor, saliency: Tensor, k: int | Tensor, *, group: int = 0) -> Tensor:
    """Choose the binary mask of the k highest M of every row (or group), (rows, d) bool; ties go to higher saliency.

    Args:
        lmo: the selection of a kernel, for example `lmo.lmo`.
        M: (rows, d) fp32, the relaxed mask.
        saliency: (rows, d) fp32, at least 0.
        k: number of kept entries of a row, an int or an int tensor (rows,). With `group` it is an int, the number of
            kept entries of a group.
        group: 0 for whole rows, m for n:m; up to 32.
    """
    first = lmo(M, k, group=group, check_nan=False)
    # Each group is treated as a row.
    m, s, chosen = (x.reshape(-1, group or M.shape[1]) for x in (M, saliency, first))
    least, order = lowest(m, chosen), torch.empty_like(m)
    for rows in row_blocks(m):
        side = torch.sub(m[rows], least[rows, None]).sign_()
        torch.add(s[rows], side, alpha=torch.finfo(torch.float32).max, out=order[rows])
    return lmo(order.view(M.shape), k, group=group, check_nan=False, out=first)
