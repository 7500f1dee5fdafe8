"""A whole solve, 30 steps at 60 %, by shape: the product's way, the obvious way, and the matrix products alone.

On a GPU there is also the product's way without a CUDA graph, every step launched by itself. Without a GPU the shapes
are those of SmolLM2-135M's layers only, and the kernels are torch's.
"""

from types import SimpleNamespace

import cost
import pytest
import torch
from baselines import obvious_frank_wolfe
from cost import Cost
from operations import GPU, PRECISION, SHAPES, measure, normal

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.solver import PruneConfig, prune_layers

STEPS = 30
LAYERS = SHAPES[:3] * GPU + [(1536, 576), (576, 1536)]
CONFIG = PruneConfig.masks_only(sparsity="0.6", steps=STEPS, swaps=0, damp=0.0, precision=PRECISION)
OURS = Backend(triton_ops if GPU else cpu, PRECISION)


def solve(W: torch.Tensor, G: torch.Tensor, backend: Backend = OURS) -> float:
    """Prune W in place; returns the error."""
    (result,) = prune_layers([("layer", W)], G, "sparsefw", CONFIG, backend)
    return result.error


def step_by_step(W: torch.Tensor, G: torch.Tensor) -> float:
    """The same without a graph."""
    operations = SimpleNamespace(**vars(triton_ops) | {"repeat": cpu.repeat})
    return solve(W, G, Backend(operations, PRECISION))


def obvious(W: torch.Tensor, G: torch.Tensor) -> float:
    """The same, as one would write it down at first."""
    mask, error = obvious_frank_wolfe(W, G, W.shape[1] - int(0.6 * W.shape[1]), STEPS)
    W *= mask
    return error.double().sum().item()


def products(W: torch.Tensor, G: torch.Tensor) -> None:
    """The products of a solve, each from scratch: one a step, three for the start and the errors."""
    for _ in range(STEPS + 3):
        W @ G


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("way", [obvious, solve, *[step_by_step] * GPU, products], ids=lambda way: way.__name__)
def test_solve(benchmark, way, shape):
    rows, d = shape
    W = 0.02 * normal(rows, d)
    # Inputs that are correlated, as those of layers are.
    X = normal(4096, d, seed=1) @ normal(d, d, seed=2) / d**0.5
    G = X.T @ X
    benchmark.group = f"{rows} x {d}"
    with torch.no_grad():
        assert solve(W.clone(), G) == pytest.approx(obvious(W.clone(), G), rel=5e-3)
        product, step = cost.product(rows, d, E=4, G=4), cost.row_step(rows, d, W=4, E=4)
        flops = (STEPS + 3) * product.flops + STEPS * step.flops
        least = Cost(flops, (STEPS + 3) * product.bytes + STEPS * step.bytes)
        measure(benchmark, lambda W: way(W, G), least, unit=PRECISION, setup=lambda: (W.clone(),))
