"""Layers that share an input, for the tests of prune_layers."""

import torch
from helpers.kernel_inputs import generator

from sparsefw.kernels.backend import TORCH
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import prune_layers
from sparsefw.solver.refit import Cross

D = 96
# One of them has one row: its product takes another path through the library.
ROWS = (37, 1, 64, 101)
ERRORS = ("error", "error_mask", "error_warm_start", "gap")
PATTERNS = ("0.6", "2:4", "layer:0.6")


def make_gram(d=D, seed=0, tokens=200):
    X = torch.randn(tokens, d // 3, generator=generator(seed)) @ torch.randn(d // 3, d, generator=generator(100))
    X += 2 * torch.randn(tokens, d, generator=generator(seed + 1))
    G = X.T @ X
    return (G.tril() + G.tril(-1).T).contiguous()


def make_layers(rows=ROWS, d=D, dtype=torch.bfloat16):
    return [(f"layer{i}", torch.randn(n, d, generator=generator(i)).to(dtype)) for i, n in enumerate(rows)]


def make_crosses(rows=ROWS, d=D):
    """A cross matrix B of recorded outputs for every layer."""
    return [Cross("outputs", 200 * torch.randn(n, d, generator=generator(50 + i))) for i, n in enumerate(rows)]


def make_config(sparsity="0.6", **options):
    """A config with few steps, half of the kept weights fixed and, without a refit, no swaps."""
    refit = options.get("refit", 3)
    few = dict(steps=9, alpha=0.5, refit=refit, rounds=2 if refit else 0, swaps=0, damp=0.1)
    return PruneConfig(sparsity=sparsity, **(few | dict(kernel="torch", precision="ieee") | options))


def run(layers, G=None, method="sparsefw", config=None, backend=TORCH, **options):
    """Prune copies of the layers; returns them by name, and the results."""
    pruned = [(name, W.clone()) for name, W in layers]
    G = make_gram(layers[0][1].shape[1]) if G is None else G.clone()
    return dict(pruned), list(prune_layers(pruned, G, method, config or make_config(), backend, **options))


def run_alone(layers, config, crosses=None):
    """`run` with each layer in a stack of its own."""
    crosses = crosses or [None] * len(layers)
    runs = [run([layer], config=config, crosses=[cross]) for layer, cross in zip(layers, crosses, strict=True)]
    return {name: W for pruned, _ in runs for name, W in pruned.items()}, [row for _, rows in runs for row in rows]


def error(W, Z, G):
    E = W.double() - Z.double()
    return (E * (E @ G.double())).sum(1)


def assert_same(first, second):
    for name, W in first[0].items():
        assert torch.equal(W, second[0][name]), name
    for a, b in zip(first[1], second[1], strict=True):
        assert (a.name, a.kept, a.alpha) == (b.name, b.kept, b.alpha)
        assert all(getattr(a, e) == getattr(b, e) for e in ERRORS)
