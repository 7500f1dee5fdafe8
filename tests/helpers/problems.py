"""Random layers and problems for the tests of the solver, and the true values to compare with."""

import itertools
from dataclasses import replace

import torch
from helpers.kernel_inputs import generator
from helpers.tensors import assert_equal

from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import paper, patterns, stack
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.layer import prune_layers
from sparsefw.solver.methods import SALIENCIES
from sparsefw.solver.targets import Cross

TRITON = Backend(triton_ops)

# Layers that share an input, for `prune_layers`.
D = 96
# One of them has one row: its product takes another path through the library.
ROWS = (37, 1, 64, 101)
ERRORS = ("error", "error_mask", "error_warm_start", "gap")
PATTERNS = ("0.6", "2:4", "layer:0.6")


def make_problem(rows, d, sparsity="0.6", alpha=0.0, warm_start="wanda", whole=False):
    """A random layer with correlated inputs; `whole`: with one budget for the whole matrix."""
    draws = generator(0)
    W = torch.randn(rows, d, generator=draws)
    X = torch.randn(4 * d, d, generator=draws)
    X = 0.3 * X + 0.7 * torch.randn(4 * d, 1, generator=draws)
    G = X.T @ X
    G = (G + G.T) / 2
    saliency = SALIENCIES[warm_start](W, G)
    pattern = patterns.parse(sparsity)
    problem, backend = problem_of(W, G, saliency, stack.kept(saliency, [slice(None)], pattern), pattern.group), TORCH
    if whole:
        problem, backend = paper.as_one_row(problem, backend)
    if not alpha:
        return problem
    return replace(problem, fixed=paper.fixed_entries(problem, warm_of(problem, backend), alpha, backend))


def problem_of(W, G, saliency, k, group=0):
    """A problem without damping."""
    return Problem(W, G, G, saliency, k, group, exact=G, dtype=W.dtype)


def warm_of(problem, backend=TORCH):
    """The warm start."""
    return backend.lmo(problem.saliency, problem.k, group=problem.group, check_nan=False)


def on_gpu(problem, device="cuda"):
    """The problem with its tensors on the GPU. Without damping, H is G there, too."""
    tensors = {name: x for name, x in vars(problem).items() if isinstance(x, torch.Tensor)}
    moved = {id(x): x.to(device) for x in tensors.values()}
    return replace(problem, **{name: moved[id(x)] for name, x in tensors.items()})


def assert_budget(problem, mask):
    """As many weights are kept as there have to be, those among them that are fixed."""
    kept = mask.view(len(mask), -1, problem.group or mask.shape[1]).sum(2)
    assert (kept == (problem.k[:, None] if isinstance(problem.k, torch.Tensor) else problem.k)).all()
    assert problem.fixed is None or mask[problem.fixed].all()


def exhaustive(problem):
    """The lowest error of each row over all masks of its budget, by trying them; masks keep the fixed entries."""
    W, G, (rows, d) = problem.W.double(), problem.G.double(), problem.W.shape
    gap = 0 if problem.target_gap is None else problem.target_gap.double()
    fixed = torch.zeros(rows, d, dtype=torch.bool) if problem.fixed is None else problem.fixed
    best = torch.full((rows,), torch.inf, dtype=torch.float64)
    for kept in itertools.combinations(range(d), problem.k):
        E = gap + W.index_fill(1, torch.tensor(kept), 0)
        allowed = fixed.sum(1) == fixed[:, list(kept)].sum(1)
        best = torch.where(allowed, torch.minimum(best, (E * (E @ G)).sum(1)), best)
    return best


def make_gram(d=D):
    X = torch.randn(200, d // 3, generator=generator(0)) @ torch.randn(d // 3, d, generator=generator(100))
    X += 2 * torch.randn(200, d, generator=generator(1))
    G = X.T @ X
    return (G.tril() + G.tril(-1).T).contiguous()


def make_layers(rows=ROWS, d=D, dtype=torch.bfloat16):
    return [(f"layer{i}", torch.randn(n, d, generator=generator(i)).to(dtype)) for i, n in enumerate(rows)]


def make_layer(rows, dtype=torch.bfloat16):
    """The weights of one layer, and the Gram matrix of its inputs."""
    return make_layers((rows,), dtype=dtype)[0][1], make_gram()


def make_crosses():
    """A cross matrix B of recorded outputs for every layer."""
    return [Cross("outputs", 200 * torch.randn(n, D, generator=generator(50 + i))) for i, n in enumerate(ROWS)]


def make_config(sparsity="0.6", **options):
    """A config with few steps, half of the kept weights fixed and, without a refit, no swaps."""
    refit = options.get("refit", 3)
    few = dict(steps=9, alpha=0.5, refit=refit, rounds=2 if refit else 0, swaps=0, damp=0.1)
    return PruneConfig(sparsity=sparsity, **(few | dict(kernel="torch", precision="ieee") | options))


def run(layers, G=None, method="sparsefw", config=None, **options):
    """Prune copies of the layers, in one stack where that is possible; returns them by name, and the results."""
    pruned, config = [(name, W.clone()) for name, W in layers], (config or make_config()).on(torch.device("cpu"))
    G = make_gram(layers[0][1].shape[1]) if G is None else G.clone()
    crosses = options.pop("crosses", None) or [None] * len(layers)
    height = len(layers) if config.rows_independent(method) else 1
    results = []
    for n in range(0, len(layers), height):
        stacked, own = pruned[n : n + height], crosses[n : n + height]
        results += prune_layers(stacked, G, method, config, crosses=own, **options)
    return dict(pruned), results


def assert_same(first, second):
    assert_equal(first[0], second[0])
    for a, b in zip(first[1], second[1], strict=True):
        assert (a.name, a.kept, a.alpha) == (b.name, b.kept, b.alpha)
        assert all(getattr(a, e) == getattr(b, e) for e in ERRORS)


def error(W, Z, G):
    """The error of weights from its definition, (rows,) float64."""
    E = W.double() - Z.double()
    return (E * (E @ G.double())).sum(1)
