"""Damping: what is chosen on the inputs of a calibration text must hold on other text.

A Gram matrix with a part of its diagonal added counts every input a little as if it were independent of the others. It
draws refitted weights towards the layer's own, and masks towards what the weights are worth by themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

# An input is damped at least as if it had this share of the median input's diagonal entry. Else the weights of an input
# that is all but dead could become huge, and ruin the first text in which it is alive.
FLOOR = 0.01


@contextmanager
def damped(G: Tensor, damp: float) -> Iterator[Tensor]:
    """Inside, damp max(diag G, FLOOR median(diag G)) is added to the diagonal of G; yields what is added, (d,) fp32.

    In place, since a copy can be the largest tensor of a layer; the diagonal comes back bit for bit.
    """
    diagonal = G.diagonal().clone()
    added = diagonal.clamp(min=FLOOR * diagonal.median().item()) * damp
    G.diagonal().add_(added)
    try:
        yield added
    finally:
        G.diagonal().copy_(diagonal)
