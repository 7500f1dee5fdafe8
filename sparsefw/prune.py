"""Prune one layer by a named method, and say what came of it."""

import time
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from sparsefw import frank_wolfe, patterns
from sparsefw.patterns import Pattern
from sparsefw.saliency import SALIENCIES

METHODS = ("sparsefw", *SALIENCIES)


@dataclass(frozen=True)
class Settings:
    """How masks are chosen; the same for every layer of a run.

    Attributes:
        pattern: sparsity pattern.
        warm_start: saliency that gives the warm start.
        steps, step_rule, penalty, best_of, precision: see `frank_wolfe.solve`.
        alpha, whole: see `frank_wolfe.pose`; `whole` makes a `layer:` budget one problem instead of one per row.
    """

    pattern: Pattern
    warm_start: str = "wanda"
    steps: int = 30
    step_rule: str = "line-search"
    penalty: float = 1.0
    alpha: float = 0.5
    best_of: bool = True
    whole: bool = False
    precision: str = "ieee"


@dataclass(frozen=True)
class LayerResult:
    """One row of the log and of the report.

    Attributes:
        name: the weight's name in the checkpoint's model.
        shape: (out, in).
        pattern: sparsity pattern, as the user wrote it.
        method: how the mask was chosen.
        warm_start: saliency of the warm start.
        alpha: fraction of kept entries fixed by saliency; None where nothing is fixed.
        steps: Frank-Wolfe steps.
        error_warm_start: ||W X - (M * W) X||_F^2 of the warm start's mask, over all calibration tokens.
        error: the same of the mask chosen.
        relative_error: error / error_warm_start; 1 where both are 0.
        gap: error minus the largest lower bound; no mask that keeps the fixed entries is better by more. None where
            no step was taken.
        seconds: for choosing the mask, without the calibration forward.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    method: str
    warm_start: str
    alpha: float | None
    steps: int
    error_warm_start: float
    error: float
    relative_error: float
    gap: float | None
    seconds: float


def prune_layer(name: str, weight: Tensor, G: Tensor, method: str, settings: Settings, ops: ModuleType) -> LayerResult:
    """Choose the mask of one layer and zero what it removes, in place.

    Args:
        name: for the result and for errors.
        weight: (out, in) view into the block, fp32 / bf16 / fp16, any strides.
        G: (in, in) fp32 Gram matrix of its inputs.
        method: "sparsefw", or the saliency whose warm start is the answer.
        settings: the run's settings.
        ops: the kernels, `sparsefw.kernels.reference` or `sparsefw.kernels.fused`.

    Raises:
        InputError: the rows do not divide into the pattern's groups.
        FloatingPointError: the layer's error is not finite; the message names it.
    """
    started = time.perf_counter()
    rows, d = weight.shape
    pattern = settings.pattern
    patterns.check_width(pattern, d, name)
    frank_wolfe_runs = method == "sparsefw"
    saliency_name = settings.warm_start if frank_wolfe_runs else method
    whole = settings.whole and frank_wolfe_runs
    # A CPU has no bf16 or fp16 arithmetic worth using; fp32 holds the same weights.
    W = weight.float() if weight.device.type == "cpu" else weight
    W = W.contiguous()
    saliency = SALIENCIES[saliency_name](W, G.diagonal())
    k = patterns.kept_in_layer(pattern, rows, d) if whole else patterns.budget(pattern, saliency)
    alpha = settings.alpha if frank_wolfe_runs else 0.0
    problem = frank_wolfe.pose(W, G, saliency, k, group=pattern.group, whole=whole, alpha=alpha, ops=ops)
    steps = settings.steps if frank_wolfe_runs else 0
    try:
        solution = frank_wolfe.solve(
            problem,
            steps=steps,
            step_rule=settings.step_rule,
            penalty=settings.penalty if frank_wolfe_runs else 0.0,
            best_of=settings.best_of,
            precision=settings.precision,
            ops=ops,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}: {error}") from error
    weight.masked_fill_(~solution.mask, 0)
    error = solution.error.double().sum().item()
    error_warm_start = solution.error_warm_start.double().sum().item()
    bound = solution.bound.double().sum().item()
    return LayerResult(
        name=name,
        shape=(rows, d),
        pattern=pattern.text,
        method=method,
        warm_start=saliency_name,
        alpha=settings.alpha if frank_wolfe_runs else None,
        steps=steps,
        error_warm_start=error_warm_start,
        error=error,
        relative_error=error / error_warm_start if error_warm_start else 1.0,
        gap=error - bound if steps else None,
        seconds=time.perf_counter() - started,
    )
