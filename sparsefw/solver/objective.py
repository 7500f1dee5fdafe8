"""Damping: what is chosen on the inputs of a calibration text must hold on other text.

A Gram matrix with a part of its diagonal added counts every input a little as if it were independent of the others. It
draws refitted weights towards the layer's own, and masks towards what the weights are worth by themselves.
"""

from torch import Tensor

# An input is damped at least as if it had this share of the median input's diagonal entry. Else the weights of an input
# that is all but dead could become huge, and ruin the first text in which it is alive.
FLOOR = 0.01


def damped(G: Tensor, damp: float) -> Tensor:
    """A copy of G (d, d) with damp max(diag G, FLOOR median(diag G)) added to its diagonal; G itself if damp is 0."""
    if not damp:
        return G
    diagonal = G.diagonal()
    H = G.clone()
    H.diagonal().add_(diagonal.clamp(min=FLOOR * diagonal.median().item()) * damp)
    return H
