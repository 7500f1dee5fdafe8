"""Time a whole solve at 60 %, by shape, and its matrix products alone: `python bench/runs/solve.py [STEPS]`.

On a GPU: by torch, and by Triton with a CUDA graph. Without a GPU the shapes are
those of SmolLM2-135M's layers only, and the kernels are torch's.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

# The package of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from bench.report import markdown
from bench.timing import DEVICE, GPU, Stopwatch, race
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.operation import Size
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import prune_layers

PRECISION = "bf16" if GPU else "ieee"
LAYERS = [(4096, 4096), (4096, 14336), (8192, 8192)] * GPU + [(1536, 576), (576, 1536)]
CONFIG = partial(PruneConfig, sparsity="0.6", refit=0, swaps=0, damp=0.0, precision=PRECISION)
KERNELS = {"torch": cpu} | ({"triton": triton_ops} if GPU else {})
# Seconds of timing of a shape.
LIMIT = 20


def inputs(rows: int, d: int) -> tuple[Tensor, Tensor]:
    """Make a weight, and the Gram matrix of inputs that are correlated, as those of layers are."""
    normal = Size(rows, d, device=DEVICE).normal
    X = normal(min(4096, 2 * d), d, seed=1) @ normal(d, d, seed=2) / d**0.5
    return 0.02 * normal(rows, d), X.T @ X


def solve(way: str, steps: int, W: Tensor, G: Tensor) -> float:
    """Prune a layer; returns its error."""
    (result,) = prune_layers([("layer", W)], G, "sparsefw", CONFIG(steps=steps), Backend(KERNELS[way], PRECISION))
    return result.error


def products(steps: int, W: Tensor, G: Tensor) -> None:
    """Make the products of a solve: one a step, and three for start and errors."""
    for _ in range(steps + 3):
        W @ G


@torch.no_grad()
def main(steps: int = 30) -> None:
    """Check that all ways end at one error, time them, and print a table."""
    cells = []
    for rows, d in LAYERS:
        W, G = inputs(rows, d)
        ways = {way: partial(solve, way, steps, G=G) for way in KERNELS}
        errors = {way: run(W.clone()) for way, run in ways.items()}
        if max(errors.values()) > 1.005 * min(errors.values()):
            sys.exit(f"{rows}x{d}: not one error: {errors}")
        ways["products"] = partial(products, steps, G=G)
        times = race({way: Stopwatch(run, lambda W=W: dict(W=W.clone())) for way, run in ways.items()}, LIMIT)
        for way, seconds in times.items():
            median = statistics.median(seconds)
            rate = (steps + 3) * 2 * rows * d**2 / median / 1e9
            cells.append([f"{rows}x{d}", way, f"{1e3 * median:,.1f}", f"{rate:,.1f}"])
    print(markdown(["layer", "way", "median ms", "GFLOP/s of products"], cells, texts=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
