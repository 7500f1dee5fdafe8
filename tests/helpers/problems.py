"""Random layer problems for the tests of the solver, and the true values to compare with."""

import itertools
from dataclasses import replace

import torch

from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import paper, patterns
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.methods import SALIENCIES

TRITON = Backend(triton_ops)


def make_problem(rows, d, sparsity="0.6", alpha=0.0, seed=0, warm_start="wanda", correlation=0.7, whole=None):
    """A random layer with correlated inputs; `whole`: the backend that chooses from the whole matrix."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, d, generator=generator)
    X = torch.randn(4 * d, d, generator=generator)
    X = (1 - correlation) * X + correlation * torch.randn(4 * d, 1, generator=generator)
    G = X.T @ X
    G = (G + G.T) / 2
    saliency = SALIENCIES[warm_start](W, G.diagonal())
    pattern = patterns.parse(sparsity)
    k = patterns.kept(pattern, saliency) if whole is None else patterns.kept_in_layer(pattern, rows, d)
    backend = TORCH if whole is None else whole
    problem = problem_of(W, G, saliency, k, pattern.group, backend)
    return replace(problem, fixed=paper.fixed_entries(problem, alpha, backend)) if alpha else problem


def problem_of(W, G, saliency, k, group=0, backend=TORCH):
    """A problem on G with its warm start."""
    warm = backend.lmo(saliency, k, group=group, checked=False)
    return Problem(W, G, saliency, k, warm, group, exact=G)


def damped_problem(problem, H):
    """The problem, whose mask is chosen on H."""
    return replace(problem, H=H, damping=H.diagonal() - problem.H.diagonal())


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
    """The lowest error of each row over all masks of its budget, by trying them; masks keep the fixed entries."""
    W, G, (rows, d) = problem.W.double(), problem.H.double(), problem.W.shape
    gap = 0 if problem.target_gap is None else problem.target_gap.double()
    fixed = torch.zeros(rows, d, dtype=torch.bool) if problem.fixed is None else problem.fixed
    best = torch.full((rows,), torch.inf, dtype=torch.float64)
    for kept in itertools.combinations(range(d), problem.k):
        E = gap + W.index_fill(1, torch.tensor(kept), 0)
        allowed = fixed.sum(1) == fixed[:, list(kept)].sum(1)
        best = torch.where(allowed, torch.minimum(best, (E * (E @ G)).sum(1)), best)
    return best
