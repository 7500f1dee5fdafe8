"""Positions of padding in a micro-batch. Layers are not fitted to them."""

from collections.abc import Iterable

from torch import Tensor

# In a mask that is added to attention scores, a position with a lower value than this is hidden.
HIDDEN = -1e3


def unpadded_of(masks: Iterable[Tensor]) -> Tensor | None:
    """Find the positions that at least one position may attend to.

    Args:
        masks: (batch, seqlen) or (batch, ..., seqlen). A mask of booleans or integers is not 0 at visible positions. A
            floating-point mask is added to attention scores, and is far below 0 at hidden positions.

    Returns:
        (batch, seqlen) true at visible positions; None if no position or every position is hidden.
    """
    found: Tensor | None = None
    for x in masks:
        seen = x > HIDDEN if x.is_floating_point() else x != 0
        seen = seen.flatten(1, -2).any(1) if x.dim() > 2 else seen
        found = seen if found is None else found & seen if found.shape == seen.shape else found
    return None if found is None or found.all() or not found.any() else found


def without_padding(x: Tensor, unpadded: Tensor | None) -> Tensor:
    """Set a tensor (batch, seqlen, d) or (seqlen, batch, d) to zero at the positions of padding.

    A tensor of any other shape is returned unchanged. So is every tensor if batch and seqlen are equal, since the two
    layouts cannot be told apart then.
    """
    for seen in () if unpadded is None or unpadded.shape == unpadded.T.shape else (unpadded, unpadded.T):
        if x.shape[:-1] == seen.shape:
            return x.masked_fill(~seen[..., None], 0)
    return x
