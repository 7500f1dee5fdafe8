"""Time a whole solve, 30 steps at 60 %, by shape, and its matrix products alone.

On a GPU: by torch, by Triton with a CUDA graph, and with every step launched by itself. Without a GPU the shapes are
those of SmolLM2-135M's layers only, and the kernels are torch's.
"""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from timing import DEVICE, GPU
from torch import Tensor

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.operation import Cost, Size
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import prune_layers

STEPS = 30
PRECISION = "bf16" if GPU else "ieee"
LAYERS = [(4096, 4096), (4096, 14336), (8192, 8192)] * GPU + [(1536, 576), (576, 1536)]
CONFIG = partial(PruneConfig, sparsity="0.6", refit=0, swaps=0, damp=0.0, precision=PRECISION)
STEP_BY_STEP = SimpleNamespace(**vars(triton_ops) | {"repeat": cpu.repeat})
KERNELS = {"torch": cpu, "triton": triton_ops, "step by step": STEP_BY_STEP}
WAYS = ["torch", *["triton", "step by step"] * GPU, "products"]


@cache
def inputs(rows: int, d: int) -> tuple[Tensor, Tensor]:
    """Make a weight, and the Gram matrix of inputs that are correlated, as those of layers are."""
    normal = Size(rows, d, device=DEVICE).normal
    X = normal(min(4096, 2 * d), d, seed=1) @ normal(d, d, seed=2) / d**0.5
    return 0.02 * normal(rows, d), X.T @ X


def solve(way: str, steps: int, W: Tensor, G: Tensor) -> float:
    """Prune a layer; returns its error. It makes a product a step, and three for start and errors."""
    if way == "products":
        for _ in range(steps + 3):
            W @ G
        return 0.0
    config = CONFIG(steps=steps)
    (result,) = prune_layers([("layer", W)], G, "sparsefw", config, Backend(KERNELS[way], PRECISION))
    return result.error


@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_solve(timed, benchmark, way, shape):
    # Few steps show as well that all ways end at one error.
    steps = STEPS if benchmark.enabled else 3
    W, G = inputs(*shape)
    # Each product reads E and G and writes U; each step reads and writes 30 bytes an entry. All are fp32.
    entries, d = W.numel(), len(G)
    flops = (steps + 3) * 2 * entries * d + steps * 30 * entries
    cost = Cost(flops, (steps + 3) * (8 * entries + 4 * d * d) + steps * 30 * entries, PRECISION)
    with torch.no_grad():
        if way not in ("torch", "products"):
            assert solve(way, steps, W.clone(), G) == pytest.approx(solve("torch", steps, W.clone(), G), rel=5e-3)
        timed(partial(solve, way, steps, G=G), lambda: dict(W=W.clone()), cost)
