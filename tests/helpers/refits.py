"""True values for refits: the error, and the exact solution of a least-squares problem."""

import torch
from helpers.kernel_inputs import DEVICE


def damp_by(G, damp=0.1):
    return G + damp * G.diagonal().diag()


def error(W, Z, G):
    """The error of weights from its definition, (rows,) float64."""
    E = W.double() - Z.double()
    return (E * (E @ G.double())).sum(1)


def exact(W, G, mask):
    """The weights of least error under the mask, row by row in float64."""
    W, G, Z = W.double().cpu(), G.double().cpu(), torch.zeros(W.shape, dtype=torch.float64)
    for w, kept, z in zip(W, mask.cpu(), Z, strict=True):
        if kept.any():
            # gelsd returns the smallest correction where several are equally good.
            removed = (G[kept][:, ~kept] @ w[~kept])[:, None]
            z[kept] = w[kept] + torch.linalg.lstsq(G[kept][:, kept], removed, driver="gelsd").solution[:, 0]
    return Z.to(DEVICE)
