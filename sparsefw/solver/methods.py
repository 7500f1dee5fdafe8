"""The methods that `--method` names: what each chooses for rows that read the same input."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from sparsefw.kernels.topk_torch import keep
from sparsefw.solver import frank_wolfe, reselect, sparsegpt
from sparsefw.solver.frank_wolfe import exact, mask_error
from sparsefw.solver.patterns import Pattern
from sparsefw.solver.saliency import SALIENCIES

# See `Settings`.
TARGETS = ("dense", "layer")


@dataclass(frozen=True)
class Settings:
    """How masks and weights are chosen; the same for every layer of a run.

    Attributes:
        pattern: sparsity pattern.
        warm_start: saliency that gives the warm start.
        steps, step_rule, penalty, swaps, best_of, precision: see `frank_wolfe.solve`.
        alpha, whole: see `frank_wolfe.pose`; `whole` makes a `layer:` budget one problem instead of one per row.
        refit, rounds: see `reselect.refine`; refit 0 leaves the kept weights as they are.
        target: what layers approximate: "dense", the dense model's outputs, see `target.target`; "layer", what the
            layer itself makes of its input. Methods other than sparsefw know the second only.
        damp: added to the Gram matrix for masks of unchanged weights, refits and targets, as a fraction of its
            diagonal.
        memory: bytes that the state of one solve may take; longer stacks are solved in chunks of rows.
    """

    pattern: Pattern
    warm_start: str = "wanda"
    steps: int = 30
    step_rule: str = "line-search"
    penalty: float = 1.0
    alpha: float = 0.0
    swaps: int = 0
    best_of: bool = True
    whole: bool = False
    precision: str = "ieee"
    refit: int = 0
    rounds: int = 3
    target: str = "layer"
    damp: float = 0.1
    memory: int = 4 << 30


@dataclass(frozen=True)
class Rows:
    """Stacked rows that read the same input, and what they may keep.

    Attributes:
        W: (rows, d) weight, or where it is refitted the target in its place: fp32, or on a GPU the checkpoint's dtype.
        G: (d, d) fp32 Gram matrix of the input.
        saliency: (rows, d) fp32, of the warm start.
        k: kept per row, an int or an int64 tensor (rows,); per group under n:m; in all under `whole`.
        dtype: of the checkpoint, to which weights are rounded in the end.
        lacks: (rows, d) fp32, the target minus W where W stays as it is; None where they are the same.
        damped: (d, d) fp32, G damped as the settings say (G itself where they do not), for methods that use it.
    """

    W: Tensor
    G: Tensor
    saliency: Tensor
    k: int | Tensor
    dtype: torch.dtype
    lacks: Tensor | None = None
    damped: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Rows":
        k = self.k[rows] if isinstance(self.k, Tensor) else self.k
        lacks = None if self.lacks is None else self.lacks[rows]
        return replace(self, W=self.W[rows], saliency=self.saliency[rows], k=k, lacks=lacks)


@dataclass(frozen=True)
class Choice:
    """What a method chose; errors (rows,) fp32, on the Gram matrix as it was measured.

    Attributes:
        mask: (rows, d) bool, True keeps a weight.
        weight: (rows, d) in the checkpoint's dtype, 0 outside the mask; None leaves the kept weights as they are.
        error: of what is written.
        error_mask: of the best mask found for unchanged weights; equals `error` without a refit.
        error_warm_start: of the warm start's mask.
        bound: no mask of unchanged weights that keeps the fixed entries has a lower error; None where not known.
    """

    mask: Tensor
    weight: Tensor | None
    error: Tensor
    error_mask: Tensor
    error_warm_start: Tensor
    bound: Tensor | None


def choose_frank_wolfe(rows: Rows, settings: Settings, ops: ModuleType) -> Choice:
    """Masks by Frank-Wolfe, and with `settings.refit` weights as well."""
    group, whole = settings.pattern.group, settings.whole
    options = {"precision": settings.precision, "ops": ops}
    problem = frank_wolfe.pose(
        rows.W,
        rows.G,
        rows.saliency,
        rows.k,
        group=group,
        whole=whole,
        alpha=settings.alpha,
        lacks=rows.lacks,
        # To a mask that a refit starts from and chooses again, damping made no difference.
        damped=None if settings.refit else rows.damped,
        ops=ops,
    )
    solution = frank_wolfe.solve(
        problem,
        steps=settings.steps,
        step_rule=settings.step_rule,
        penalty=settings.penalty,
        swaps=settings.swaps,
        best_of=settings.best_of,
        **options,
    )
    # Of a whole matrix there is one bound: an equal share for each row.
    bound = solution.bound.expand(len(rows.W)) / (len(rows.W) if whole else 1)
    known = {"error_warm_start": solution.error_warm_start, "bound": bound if settings.steps else None}
    if not settings.refit:
        return Choice(solution.mask, None, solution.error, solution.error, **known)
    fit = reselect.refine(
        replace(problem, G=rows.damped),
        solution.mask,
        steps=settings.steps,
        penalty=settings.penalty,
        refit_steps=settings.refit,
        rounds=settings.rounds,
        **options,
    )
    written = fit.Z.to(rows.dtype)
    error = weight_error(rows.W, written, rows.G, exact(settings.precision), ops)
    # Per row, and of the weights as they are written: no refit ever makes a row worse.
    better = error < solution.error
    mask = torch.where(better[:, None], fit.mask, solution.mask)
    unchanged = keep(rows.W.to(rows.dtype), mask)
    written = torch.where(better[:, None], written, unchanged)
    return Choice(mask, written, torch.where(better, error, solution.error), solution.error, **known)


def choose_saliency(rows: Rows, settings: Settings, ops: ModuleType) -> Choice:
    """The warm start's mask, as it is."""
    mask = ops.lmo(rows.saliency, rows.k, group=settings.pattern.group)
    error = mask_error(rows.W, mask, rows.G, precision=exact(settings.precision), ops=ops)
    return Choice(mask, None, error, error, error, None)


def choose_weights(
    prune: Callable[[Rows, Settings], tuple[Tensor, Tensor]], rows: Rows, settings: Settings, ops: ModuleType
) -> Choice:
    """Mask and weights by a method that chooses both, as (mask, Z); the warm start is there for comparison."""
    warm = ops.lmo(rows.saliency, rows.k, group=settings.pattern.group)
    mask, Z = prune(rows, settings)
    written = Z.to(rows.dtype)
    exactly = {"precision": exact(settings.precision), "ops": ops}
    error = weight_error(rows.W, written, rows.G, **exactly)
    error_mask, error_warm_start = (mask_error(rows.W, m, rows.G, **exactly) for m in (mask, warm))
    return Choice(mask, written, error, error_mask, error_warm_start, None)


def weight_error(W: Tensor, Z: Tensor, G: Tensor, precision: str, ops: ModuleType) -> Tensor:
    """sum((W - Z) * ((W - Z) G)) per row, (rows,) fp32."""
    E = W.float() - Z.float()
    return ops.product(E, G, precision=precision).mul_(E).sum(1)


@dataclass(frozen=True)
class Method:
    """How masks are chosen.

    Attributes:
        choose: (rows, settings, ops) -> Choice.
        saliency: of the warm start; None takes the settings'.
        by_rows: whether rows are independent, so that layers are stacked and solved in chunks.
        damps: whether it uses `Rows.damped`.
    """

    choose: Callable[[Rows, Settings, ModuleType], Choice]
    saliency: str | None = None
    by_rows: bool = True
    damps: bool = False


METHODS: dict[str, Method] = {
    "sparsefw": Method(choose_frank_wolfe, damps=True),
    "sparsegpt": Method(
        partial(choose_weights, lambda rows, settings: sparsegpt.prune(rows.W, rows.G, settings.pattern)),
        saliency="wanda",
        by_rows=False,
    ),
    **{name: Method(choose_saliency, saliency=name) for name in SALIENCIES},
}
