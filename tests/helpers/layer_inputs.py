"""Layers that share an input, for the tests of prune_layers."""

import torch
from helpers.kernel_inputs import generator

from sparsefw.kernels import cpu
from sparsefw.solver import patterns
from sparsefw.solver.layer import prune_layers
from sparsefw.solver.methods import Settings

D = 96
# Of one row too: a product of one row takes another path through the library.
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


def settings(text="0.6", **changes):
    return Settings(patterns.parse(text), **(dict(steps=9, alpha=0.5, refit=3, rounds=2) | changes))


def run(layers, G=None, method="sparsefw", how=None, **options):
    """Copies of the layers, pruned, by name; and the results."""
    pruned = [(name, W.clone()) for name, W in layers]
    G = make_gram(layers[0][1].shape[1]) if G is None else G.clone()
    return dict(pruned), list(prune_layers(pruned, G, method, how or settings(), cpu, **options))


def error(W, Z, G):
    E = W.double() - Z.double()
    return (E * (E @ G.double())).sum(1)


def assert_same(one, two):
    for name, W in one[0].items():
        assert torch.equal(W, two[0][name]), name
    for a, b in zip(one[1], two[1], strict=True):
        assert (a.name, a.kept, a.alpha) == (b.name, b.kept, b.alpha)
        assert all(getattr(a, e) == getattr(b, e) for e in ERRORS)
