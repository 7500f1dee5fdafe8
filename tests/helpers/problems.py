"""Random layer problems for the tests of the solver, and the true values to compare with."""

import itertools
from dataclasses import replace

import torch

from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import frank_wolfe, patterns
from sparsefw.solver.saliency import SALIENCIES

TRITON = Backend(triton_ops)
LINE_SEARCH = {"step_rule": "line-search", "backend": TORCH}


def make_problem(rows, d, sparsity="0.6", alpha=0.0, seed=0, whole_matrix=False, warm_start="wanda", correlation=0.7):
    """A random layer with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, d, generator=generator)
    X = torch.randn(4 * d, d, generator=generator)
    X = (1 - correlation) * X + correlation * torch.randn(4 * d, 1, generator=generator)
    G = X.T @ X
    G = (G + G.T) / 2
    saliency = SALIENCIES[warm_start](W, G.diagonal())
    pattern = patterns.parse(sparsity)
    k = patterns.kept_in_layer(pattern, rows, d) if whole_matrix else patterns.kept(pattern, saliency)
    return frank_wolfe.make_problem(W, G, saliency, k, group=pattern.group, whole_matrix=whole_matrix, alpha=alpha)


def on_gpu(problem):
    """The problem with its tensors on the GPU."""
    tensors = {name: x for name, x in vars(problem).items() if isinstance(x, torch.Tensor)}
    return replace(problem, **{name: x.to("cuda") for name, x in tensors.items()})


def penalized_error(W, G, M, theta):
    """error(M) + theta sum(q M (1 - M)), per row, from the definition."""
    E = W * (1 - M)
    q = W**2 * G.diagonal()
    return (E * (E @ G)).sum(1) + theta * (q * M * (1 - M)).sum(1)


def exhaustive(problem):
    """The lowest error of each row over all masks of its budget, by trying them."""
    W, G = problem.W.double(), problem.G.double()
    best = []
    for w in W:
        errors = []
        for kept in itertools.combinations(range(len(w)), problem.k):
            e = w.clone()
            e[list(kept)] = 0
            errors.append(e @ G @ e)
        best.append(min(errors))
    return torch.stack(best)
