"""Fit weights on the Gram matrix by conjugate gradients: refits, with masks chosen again for them, and targets.

A refit lets the kept weights of a mask make up for the removed ones, by conjugate gradients on the Gram matrix:

    minimise ||(W - Z) X||_F^2 = sum((W - Z) * ((W - Z) G)) over Z, zero outside the mask

Rows are independent least-squares problems. A step costs one product; the preconditioner is the diagonal of G. Callers
damp G, see `stack.damped`: damping draws Z towards W, and stops weights whose inputs are nearly the same from
growing with opposite signs.

The best mask of unchanged weights is not the best one once the kept weights make up for the removed ones. So the
choice is repeated with refitted weights in place of W (`reselect`):

1. Frank-Wolfe on W, as `frank_wolfe.solve` does, then a refit.
2. Frank-Wolfe on the candidates T = Z + R / diag(G): kept weights as they are, removed ones where an exact step along
   their own coordinate puts them. It minimises ||(W - M * T) X||_F^2; then a refit.
3. Rounds of re-selection: the k largest |T_j| sqrt(G_jj), then a refit, accepted in the rows whose error falls. In the
   other rows too much was exchanged at once: in the next round they replace kept entries only by entries that are
   better by a margin.

Targets are the weights with which a layer would make up for the pruning of the layers before it.

Earlier layers are pruned, so a layer outputs Y = W X for its input X, and the same layer of the dense model outputs
Y + D. The target makes up for the difference D as far as the input allows:

    T minimises ||D - (T - W) X||_F^2,    so that    (T - W) G = B,    G = X X^T,  B = D X^T

Pruning then approximates T instead of W, so that each layer repairs the errors of the layers before it. The output of a
layer that writes to the residual stream includes that stream.

B comes from one of three matrices, whichever calibration has measured. X_dense is the layer's input in the dense model,
S the stream after the layer in the dense model, h the stream before it plus the bias:

    "inputs":   C^T = X (X_dense - X)^T, and B = W C, where the layer's output is its product: D = W X_dense - W X
    "streams":  (S - h) X^T, and B = (S - h) X^T - W G, where it adds its product to the stream: D = S - (h + W X)
    "outputs":  B itself, from outputs of both models

The first two subtract no outputs, which are rounded in bf16 and nearly the same. The first is one matrix for all layers
that read X, whatever their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefw.kernels.backend import TORCH, Backend, Terms
from sparsefw.kernels.topk_torch import as_float
from sparsefw.solver import frank_wolfe
from sparsefw.solver.frank_wolfe import Problem, Schedule

# Steps of the second Frank-Wolfe per step of the first. Of splits of 40 steps, 30 + 10 left the lowest error.
RESTART = 1 / 3

# The margin of a row after a rejected round, 2 margin + 0.1, and after an accepted one, 0.7 margin.
WIDEN, FIRST, NARROW = 2.0, 0.1, 0.7


@dataclass
class RowFit:
    """Weights under a mask, and their error.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        Z: (rows, d) fp32, 0 outside the mask.
        R: (rows, d) fp32, (W - Z) G.
        error: (rows,) fp32, sum((W - Z) * R) per row.
    """

    mask: Tensor
    Z: Tensor
    R: Tensor
    error: Tensor

    def take_better(self, other: "RowFit", backend: Backend = TORCH) -> Tensor:
        """Replace the rows in which the other's error is lower, in place; returns them, (rows,) bool."""
        better = other.error < self.error
        for name in ("mask", "Z", "R"):
            backend.take_rows(getattr(self, name), getattr(other, name), better)
        self.error = torch.where(better, other.error, self.error)
        return better


def inverse_diagonal(G: Tensor) -> Tensor:
    """Invert diag(G), (d,) fp32; 0 for dead inputs, and where the inverse overflows."""
    diagonal = G.diagonal().float()
    return torch.where(diagonal >= torch.finfo(diagonal.dtype).tiny, 1 / diagonal, 0)


def refit(W: Tensor, G: Tensor, mask: Tensor, start: Tensor, steps: int, *, backend: Backend = TORCH) -> RowFit:
    """Fit the kept weights by `descend`.

    Kept weights of dead inputs stay as they start, and rows without weights stay empty.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) Gram matrix, already damped; fp32, or from `Backend.operand`.
        mask: (rows, d) bool.
        start: (rows, d) fp32, where Z starts; entries outside the mask are ignored.
        steps: at least 0. Each is one product, and so is the start.
        backend: the operations.
    """
    Z, E = backend.begin_fit(W, start, mask)
    R = backend.product(E, backend.operand(G))
    # Free its memory for the steps.
    del E
    descend(Z, R, G, mask, steps, backend=backend)
    return RowFit(mask, Z, R, backend.row_errors(W, R, Z))


def descend(Z: Tensor, R: Tensor, G: Tensor, mask: Tensor | None, steps: int, *, backend: Backend = TORCH) -> None:
    """Descend by preconditioned conjugate gradients on `sum(Z * (Z G)) / 2 - sum(Z * B)` for R = B - Z G, in place.

    A step is one product, P G, and what `conjugate_step` does with it. In fp32 none raises the objective.

    Args:
        Z, R: (rows, d) fp32, the weights and their residual; both are moved.
        G: (d, d), as in `refit`.
        mask: (rows, d) bool, the weights that move; None moves all.
        steps, backend: as in `refit`.
    """
    if not steps:
        return
    G_operand, U = backend.operand(G), torch.empty_like(Z)
    # Z moves along the P that the product reads, rounded or not, so that R stays the residual of Z.
    P = torch.empty_like(Z, dtype=G_operand.dtype)
    rz, enough = Z.new_empty(2, len(Z))
    state = (Z, R, P, U, rz, enough, inverse_diagonal(G))
    backend.conjugate_step(*state, mask=mask, first=True)
    for step in range(1, steps + 1):
        backend.product(P, G_operand, out=U)
        backend.conjugate_step(*state, mask=mask, last=step == steps)


def reselect(
    problem: Problem,
    mask: Tensor,
    *,
    steps: int,
    penalty: float,
    refit_steps: int,
    rounds: int,
    backend: Backend = TORCH,
) -> RowFit:
    """Refit a mask's weights, choose masks for refitted weights, and keep the best of every row.

    Args:
        problem: the rows; weights are fitted on its H, a damped matrix. Fixed entries may be given up.
        mask: (rows, d) bool, from `frank_wolfe.solve`.
        steps, penalty: of the first Frank-Wolfe.
        refit_steps: conjugate-gradient steps of each refit.
        rounds: rounds of re-selection; 0 keeps the mask, without a second Frank-Wolfe.
        backend: the operations.

    Returns:
        The fit of the lowest error, on the damped Gram matrix, in every row. An error that is not finite is never
        lower. So no check is needed that would make the host wait for a GPU.
    """
    W, support = problem.W, problem.support
    # Converted once, for all refits.
    H = backend.operand(problem.H)
    inverse, root = inverse_diagonal(problem.H), problem.H.diagonal().float().sqrt()

    def fit(mask: Tensor, start: Tensor) -> RowFit:
        if support is not None:
            mask = mask & support
        return refit(W, H, mask, start, refit_steps, backend=backend)

    def candidates(margin: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, score = backend.candidates(best.Z, best.R, best.mask, inverse, root, margin=margin, support=support)
        return T, score

    # A copy: the best fit is replaced row by row, in place.
    best = fit(mask.clone(), W)
    if rounds == 0:
        return best
    T, score = candidates()
    schedule = frank_wolfe.line_search(round(RESTART * steps), penalty)
    best.take_better(fit(_restart(problem, T, score, schedule, backend), T), backend)
    margin = torch.zeros_like(best.error)
    for _ in range(rounds):
        T, score = candidates(margin)
        chosen = backend.lmo(score, problem.k, group=problem.group, checked=False)
        # Free its memory for the fit.
        del score
        better = best.take_better(fit(chosen, T), backend)
        margin = torch.where(better, NARROW * margin, WIDEN * margin + FIRST)
    return best


def _restart(problem: Problem, T: Tensor, score: Tensor, schedule: Schedule, backend: Backend) -> Tensor:
    """Choose a mask by Frank-Wolfe for the candidates T with these scores, (rows, d) bool."""
    candidates = replace(problem, W=T, saliency=score, target_gap=problem.W - T, fixed=None)
    warm = backend.lmo(score, problem.k, group=problem.group, checked=False)
    M = as_float(warm)
    for state in frank_wolfe.iterate(candidates, warm, schedule, backend=backend):
        M = state.M
    mask: Tensor = backend.round_mask(M, score, problem.k, group=problem.group)
    return mask


@dataclass(frozen=True)
class Cross:
    """Measure of the difference between the dense model's outputs and a layer's own, see the module.

    Attributes:
        of: "inputs", "streams" or "outputs".
        matrix: (d, d) fp32 of inputs; else (rows, d) fp32.
    """

    of: str
    matrix: Tensor


def cross_rows(
    crosses: Sequence[Cross | None],
    places: Sequence[tuple[slice, slice]],
    W: Tensor,
    G: Tensor | Terms,
    *,
    backend: Backend = TORCH,
) -> Tensor:
    """Compute rows of B for stacked layers that read one input, (rows, d) fp32.

    Args:
        crosses: what was measured of each layer; None: the layer is to be approximated itself.
        places: for each layer the rows of it that are wanted, and their place in W.
        W: (rows, d) weights. Rows in no place are padding.
        G: (d, d) Gram matrix, not damped, from `Backend.exact_operand`.
        backend: the operations.
    """
    B = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
    of = {cross.of: cross.matrix for cross in crosses if cross}
    # All rows are multiplied at once, so that a row's result does not depend on other layers.
    if "inputs" in of:
        from_inputs = backend.product_transposed(backend.operand(W), backend.operand(of["inputs"]))
    if "streams" in of:
        own = backend.exact_product(W, G)
    for cross, (rows, place) in zip(crosses, places, strict=True):
        if cross is None:
            continue
        if cross.of == "inputs":
            B[place] = from_inputs[place]
        elif cross.of == "streams":
            torch.sub(cross.matrix[rows], own[place], out=B[place])
        else:
            B[place] = cross.matrix[rows]
    return B


def find_target(
    W: Tensor, G: Tensor, B: Tensor, steps: int, *, support: Tensor | None = None, backend: Backend = TORCH
) -> Tensor:
    """Find the target T by conjugate gradients from W; (rows, d) fp32.

    Few steps on a damped G leave T close to W in directions in which the input hardly varies and says little about D.

    Args:
        W: (rows, d) the layer's weight, fp32 / bf16 / fp16.
        G: (d, d) Gram matrix, already damped; fp32, or from `Backend.operand`.
        B: (rows, d) fp32 cross matrix; overwritten.
        steps: number of conjugate-gradient steps; each is one product.
        support: (rows, d) bool, weights that may change; None: all.
        backend: the operations.
    """
    T = W.to(B.dtype, copy=True)
    descend(T, B, G, support, steps, backend=backend)
    return T
