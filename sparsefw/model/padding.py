"""Positions of padding in a micro-batch. Layers are not fitted to them."""

from collections.abc import Iterable

from torch import Tensor

# A mask that is added to scores hides the positions with less.
HIDDEN = -1e3


def unpadded_of(masks: Iterable[Tensor]) -> Tensor | None:
    """Find the positions (batch, seqlen) that masks of attention do not hide from all others.

    Args:
        masks: (batch, seqlen) or (batch, ..., seqlen), true or not 0 where a position is seen; or numbers that are
            added to scores, far below 0 where a position is hidden.

    Returns:
        True at these positions; None: there is no padding, or the masks do not tell.
    """
    found: Tensor | None = None
    for x in masks:
        seen = x > HIDDEN if x.is_floating_point() else x != 0
        seen = seen.flatten(1, -2).any(1) if x.dim() > 2 else seen
        found = seen if found is None else found & seen if found.shape == seen.shape else found
    return None if found is None or found.all() or not found.any() else found


def without_padding(x: Tensor, unpadded: Tensor | None) -> Tensor:
    """Replace a tensor (batch, seqlen, d) or (seqlen, batch, d) by zeros at the positions of padding.

    A tensor of another form is returned as it is. So is a tensor with as many windows as tokens: inside a block it is
    not known which of the two come first.
    """
    for seen in () if unpadded is None or unpadded.shape == unpadded.T.shape else (unpadded, unpadded.T):
        if x.shape[:-1] == seen.shape:
            return x.masked_fill(~seen[..., None], 0)
    return x
