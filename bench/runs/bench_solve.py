"""A whole solve, 30 steps at 60 %, by shape: the product's way, the obvious way, and the matrix products alone.

On a GPU there is also the product's way without a CUDA graph, every step launched by itself. Without a GPU the shapes
are those of SmolLM2-135M's layers only, and the kernels are torch's.
"""

from types import SimpleNamespace

import pytest
import torch
from baselines import obvious_frank_wolfe
from operations import GPU, PRECISION, SHAPES, Cost, Operation, Tensors, near, normal
from torch import Tensor

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import prune_layers

STEPS = 30
LAYERS = SHAPES[:3] * GPU + [(1536, 576), (576, 1536)]
CONFIG = PruneConfig(sparsity="0.6", refit=0, steps=STEPS, swaps=0, damp=0.0, precision=PRECISION)
OURS = Backend(triton_ops if GPU else cpu, PRECISION)
STEP_BY_STEP = Backend(SimpleNamespace(**vars(triton_ops) | {"repeat": cpu.repeat}), PRECISION)


def solve(rows: int, d: int) -> Operation:
    """Prune a layer; the result is its error. Products are one a step, and three for the start and the errors."""
    W = 0.02 * normal(rows, d)
    # Inputs that are correlated, as those of layers are.
    X = normal(4096, d, seed=1) @ normal(d, d, seed=2) / d**0.5
    G = X.T @ X

    def ours(backend: Backend, W: Tensor) -> Tensors:
        (result,) = prune_layers([("layer", W)], G, "sparsefw", CONFIG, backend)
        return (torch.tensor([result.error]),)

    def obvious(W: Tensor) -> Tensors:
        mask, error = obvious_frank_wolfe(W, G, d - int(0.6 * d), STEPS)
        W *= mask
        return (error.double().sum(0, keepdim=True).cpu(),)

    def products(W: Tensor) -> Tensors:
        for _ in range(STEPS + 3):
            W @ G
        return ()

    ways = {"torch": obvious, "ours": lambda W: ours(OURS, W), "products": products}
    ways["step by step"] = lambda W: ours(STEP_BY_STEP, W)
    # Each product reads E and G and writes U; each step reads and writes 30 bytes an entry. All are fp32.
    products_of_all, entries = STEPS + 3, rows * d
    flops = products_of_all * 2 * entries * d + STEPS * 30 * entries
    least = Cost(flops, products_of_all * (8 * entries + 4 * d * d) + STEPS * 30 * entries)
    return Operation(ways, least, near(5e-3), lambda: (W.clone(),), PRECISION)


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("way", ["torch", "ours", *["step by step"] * GPU, "products"])
def test_solve(measure, way, shape):
    with torch.no_grad():
        measure(solve(*shape), way)
