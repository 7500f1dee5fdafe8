"""A whole solve, 30 steps at 60 %: the product's way against the obvious one, by shape.

Without a GPU the shapes are those of SmolLM2-135M's layers, and the kernels are torch's.
"""

import pytest
import torch
from baselines import obvious_frank_wolfe
from operations import GPU, OPS, PRECISION, SHAPES, measure, normal

from sparsefw import patterns
from sparsefw.kernels import reference
from sparsefw.methods import Settings
from sparsefw.prune import prune_layers

STEPS, SPARSITY = 30, "0.6"
LAYERS = SHAPES if GPU else [(1536, 576), (576, 1536)]
SETTINGS = Settings(patterns.parse(SPARSITY), steps=STEPS, damp=0.0, precision=PRECISION)


def solve(W: torch.Tensor, G: torch.Tensor) -> float:
    """Prunes W in place; the error."""
    (row,) = prune_layers([("layer", W)], G, "sparsefw", SETTINGS, OPS["triton"] if GPU else reference)
    return row.error


def obvious(W: torch.Tensor, G: torch.Tensor) -> float:
    """The same, as one would write it down."""
    mask, error = obvious_frank_wolfe(W, G, W.shape[1] - int(0.6 * W.shape[1]), STEPS)
    W *= mask
    return error.double().sum().item()


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("way", [obvious, solve], ids=lambda way: way.__name__)
def test_solve(benchmark, way, shape):
    rows, d = shape
    W = 0.02 * normal(rows, d)
    # Inputs that are correlated, as those of layers are.
    X = normal(4096, d, seed=1) @ normal(d, d, seed=2) / d**0.5
    G = X.T @ X
    benchmark.group = f"{rows} x {d}"
    with torch.no_grad():
        assert way(W.clone(), G) == pytest.approx(solve(W.clone(), G), rel=5e-3)
        # A product a step, and four for the start and the errors; W, M, R, U, V in and M, R, V, E out.
        flops = 2 * (STEPS + 4) * rows * d * d
        measure(benchmark, lambda W: way(W, G), flops=flops, bytes=STEPS * rows * d * 34, setup=lambda: (W.clone(),))
