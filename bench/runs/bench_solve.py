"""Time a whole solve, 30 steps at 60 %, by shape, and its matrix products alone.

On a GPU: by torch, by Triton with a CUDA graph, and with every step launched by itself. Without a GPU the shapes are
those of SmolLM2-135M's layers only, and the kernels are torch's.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from operations import GPU, PRECISION, SHAPES, Cost, Operation, Tensors, near, normal
from torch import Tensor

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import prune_layers

STEPS = 30
LAYERS = SHAPES[:3] * GPU + [(1536, 576), (576, 1536)]
CONFIG = partial(PruneConfig, sparsity="0.6", refit=0, swaps=0, damp=0.0, precision=PRECISION)
STEP_BY_STEP = SimpleNamespace(**vars(triton_ops) | {"repeat": cpu.repeat})
KERNELS = {"torch": cpu, "triton": triton_ops, "step by step": STEP_BY_STEP}
WAYS = ["torch", *["triton", "step by step"] * GPU, "products"]


def solve(rows: int, d: int, steps: int) -> Operation:
    """Prune a layer; the result is its error. It makes a product a step, and three for start and errors."""
    W, config = 0.02 * normal(rows, d), CONFIG(steps=steps)
    # Inputs that are correlated, as those of layers are.
    X = normal(min(4096, 2 * d), d, seed=1) @ normal(d, d, seed=2) / d**0.5
    G = X.T @ X

    def by(name: str, W: Tensor) -> Tensors:
        (result,) = prune_layers([("layer", W)], G, "sparsefw", config, Backend(KERNELS[name], PRECISION))
        return (torch.tensor([result.error]),)

    def products(W: Tensor) -> Tensors:
        for _ in range(steps + 3):
            W @ G
        return ()

    ways = {name: partial(by, name) for name in KERNELS} | {"products": products}
    # Each product reads E and G and writes U; each step reads and writes 30 bytes an entry. All are fp32.
    entries = rows * d
    flops = (steps + 3) * 2 * entries * d + steps * 30 * entries
    least = Cost(flops, (steps + 3) * (8 * entries + 4 * d * d) + steps * 30 * entries)
    return Operation(ways, least, near(5e-3), lambda: (W.clone(),), PRECISION)


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_solve(measure, benchmark, way, shape):
    # Few steps show as well that all ways end at one error.
    with torch.no_grad():
        measure(solve(*shape, STEPS if benchmark.enabled else 3), way)
