"""Errors of Frank-Wolfe by step, relaxed and rounded, with and without the penalty: the paper's figure 4."""

from collections.abc import Iterator
from pathlib import Path

from dense_layers import dense_layers
from torch import Tensor

from sparsefw.kernels.backend import TORCH
from sparsefw.solver import frank_wolfe, patterns
from sparsefw.solver.objective import mask_error
from sparsefw.solver.saliency import wanda

# Sparsity of the curves, which have no fixed entries and no damping.
PATTERN = "0.6"
WITHOUT_PENALTY = {"no penalty, line search": "line-search", "no penalty, open loop": "open-loop"}
SEEN = (1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 80, 100, 130, 160, 200)
# With the penalty, each number of steps is a solve of its own: the ramp depends on it.
WITH_PENALTY, SOLVES = "penalty, line search", (5, 10, 20, 30, 60, 100)


def measure_curves(
    folder: Path, calibration: Path, block: int, *, nsamples: int, seqlen: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Errors of Frank-Wolfe by step in some layers of a block, whose inputs are the dense model's.

    Args:
        folder: the checkpoint.
        calibration: text to calibrate on.
        block: number of the block.
        nsamples, seqlen: number of windows, and tokens in each (at most the model's maximum).

    Returns:
        By layer type and curve: [steps, relaxed error, error of the rounded mask], both relative to the warm start's.
    """
    layers = dense_layers(folder, calibration, [], [block], nsamples=nsamples, seqlen=seqlen)
    return {kind: curves(W, G) for _, kind, W, (G,) in layers}


def curves(W: Tensor, G: Tensor) -> dict[str, list[list[float]]]:
    """The curves of one layer, as in `measure_curves`: W (rows, d) and its Gram matrix G (d, d), fp32."""
    k = patterns.kept_in_row(patterns.parse(PATTERN), W.shape[1])
    problem = frank_wolfe.make_problem(W, G, wanda(W, G.diagonal()), k)
    warm = mask_error(W, problem.warm, G).double().sum().item()

    def point(t: int, state: frank_wolfe.Iterate) -> list[float]:
        rounded = mask_error(W, frank_wolfe.round_mask(problem, state.M), G)
        return [t, *(float(f"{error.double().sum().item() / warm:.6g}") for error in (state.error, rounded))]

    def steps(n: int, rule: str, penalty: float) -> Iterator[tuple[int, frank_wolfe.Iterate]]:
        return enumerate(frank_wolfe.iterate(problem, steps=n, step_rule=rule, penalty=penalty, backend=TORCH), 1)

    measured = {name: [[0, 1.0, 1.0]] for name in (*WITHOUT_PENALTY, WITH_PENALTY)}
    for name, rule in WITHOUT_PENALTY.items():
        measured[name] += [point(t, state) for t, state in steps(max(SEEN), rule, 0.0) if t in SEEN]
    for n in SOLVES:
        measured[WITH_PENALTY] += [point(t, state) for t, state in steps(n, "line-search", 1.0) if t == n]
    return measured
