"""Allocation: how sparse each block of a model is, when blocks need not be alike but the model's budget stands.

owl      blocks whose saliencies hold more outliers keep more
error    the sum of the blocks' errors is least: at the optimum a weight more or less costs the same in every block

Both give one sparsity per block whose mean, weighted by size, is the sparsity asked for; `whole_budgets` turns them
into integers that keep exactly as many weights of the model as the uniform pattern does.
"""

import math
from fractions import Fraction
from types import ModuleType

import torch
from torch import Tensor

from sparsefw import patterns
from sparsefw.frank_wolfe import mask_error
from sparsefw.patterns import Pattern
from sparsefw.saliency import wanda

# How far a block's sparsity goes from the model's; OWL's lambda.
SPREAD = 0.08

# Steps between the least and the greatest sparsity of a block. At OWL's spread one is 0.00016, less than one weight of
# a row of 6000.
CELLS = 1024

# Float64 sparsities miss the mean by rounding only; a mistake in the sizes misses it by far more.
MEAN_TOLERANCE = 1e-9


def measure(how: str, layers: list[tuple[Tensor, Tensor]], sparsity: Fraction, ops: ModuleType) -> float | Tensor:
    """What a block's sparsity is decided by.

    Args:
        how: "owl": its outlier ratio; "error": the error of Wanda's masks at every sparsity of `error_grid`, as a share
            of what the layer puts out, sum over the layers.
        layers: W (rows, d) and G (d, d) fp32 of every layer of the block.
        sparsity: of the model.
        ops: the kernels.
    """
    if how == "owl":
        return outlier_ratio([wanda(W, G.diagonal()) for W, G in layers])
    errors = torch.zeros(3, dtype=torch.float64)
    for W, G in layers:
        W = W.float().contiguous()
        saliency = wanda(W, G.diagonal())
        output = mask_error(W, torch.zeros_like(W, dtype=torch.bool), G, ops=ops).double().sum().item()
        for at, s in enumerate(error_grid(sparsity)):
            mask = ops.lmo(saliency, round((1 - s) * W.shape[1]))
            error = mask_error(W, mask, G, ops=ops).double().sum().item()
            errors[at] += error / output if output else 0.0
    return errors


def share_out(how: str, measured: list, sizes: list[int], sparsity: Fraction) -> list[Fraction] | list[float]:
    """A sparsity per block from what `measure` gave for it."""
    if how == "owl":
        return by_outliers(measured, sizes, sparsity)
    return by_error(torch.stack(measured), error_grid(sparsity), sizes, sparsity)


def error_grid(sparsity: Fraction) -> list[float]:
    """Sparsities at which a block's error is measured: the ends of its range and the middle."""
    s = float(sparsity)
    # Near 0 and 1 the range is narrower: half of what is left.
    reach = min(SPREAD, s / 2, (1 - s) / 2)
    return [s - reach, s, s + reach]


def outlier_ratio(saliencies: list[Tensor], *, threshold: float = 5.0) -> float:
    """Share of a block's saliencies that exceed `threshold` times their mean (OWL, Yin et al., arXiv 2310.05175).

    Mean and share are over all layers taken together, in two passes that hold one layer at a time.

    Args:
        saliencies: (rows, d) fp32 of every layer of the block, |W_ij| ||X_j||_2 in the paper; at least 0.
        threshold: M of the paper, in means.

    Returns:
        The share, 0 to 1; the paper's code has it in percent, which gives the same sparsities.

    Raises:
        ValueError: no entries, a threshold that is not above 0, or saliencies with NaN or Inf.
    """
    count = sum(saliency.numel() for saliency in saliencies)
    if not count:
        raise ValueError("saliencies: expected at least one entry")
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold: expected a number above 0, got {threshold}")
    total = sum(saliency.sum(dtype=torch.float64).item() for saliency in saliencies)
    if not math.isfinite(total):
        raise ValueError(f"saliencies: expected finite entries, they sum to {total}")
    bar = threshold * total / count
    return sum((saliency > bar).sum().item() for saliency in saliencies) / count


def by_outliers(ratios: list[float], sizes: list[int], sparsity: Fraction, *, spread: float = SPREAD) -> list[Fraction]:
    """Sparsities of OWL: densities that follow the outlier ratios linearly (arXiv 2310.05175, section 3.3).

        r_b       = 2 spread (ratio_b - min) / (max - min)
        density_b = r_b - mean(r) + 1 - sparsity

    The paper's mean is over blocks of one size; this one is weighted by `sizes`, the same where they are equal. A block
    may lie up to 2 spread from `sparsity` when the others lie close together on its other side.

    Args:
        ratios: of every block, see `outlier_ratio`; any scale. All equal: every block gets `sparsity`.
        sizes: prunable weights of every block.
        sparsity: of the whole model, in (0, 1).
        spread: lambda of the paper; densities span 2 spread.

    Returns:
        A sparsity per block; their mean weighted by `sizes` is exactly `sparsity`.

    Raises:
        ValueError: bad input, or a spread that takes a block's sparsity out of (0, 1).
    """
    _check(len(ratios), sizes, sparsity, spread)
    if not all(map(math.isfinite, ratios)):
        raise ValueError(f"ratios: expected finite numbers, got {ratios}")
    exact = [Fraction(ratio) for ratio in ratios]
    low, high = min(exact), max(exact)
    if low == high:
        return [sparsity] * len(ratios)
    raised = [2 * Fraction(spread) * (ratio - low) / (high - low) for ratio in exact]
    mean = _mean(raised, sizes)
    sparsities = [sparsity - r + mean for r in raised]
    for block, s in enumerate(sparsities):
        if not 0 < s < 1:
            raise ValueError(f"spread: {spread} takes block {block} to a sparsity of {float(s):.4f}, outside 0 to 1")
    return sparsities


def by_error(
    errors: Tensor, grid: list[float], sizes: list[int], sparsity: Fraction, *, spread: float = SPREAD
) -> list[float]:
    """Sparsities that make the sum of the blocks' errors least.

        min sum_b error_b(s_b)   over   sum_b size_b s_b = sparsity sum_b size_b,   |s_b - sparsity| <= spread

    Between two grid points error_b is the power law in s through the measured errors (a straight line where one of them
    is 0). Removing the smallest of Gaussian weights costs about s^3, with an exponent that grows with s, so that power
    laws meet in a convex curve; exponentials in s do not. A curve that is not convex is replaced by the greatest convex
    one below it. Each curve is cut into cells; a cell costs its rise per weight, and cells are taken in order of cost
    until enough weights are removed. The cost reached is the Lagrange multiplier. Blocks that tie there all take the
    same part of their tied cells: identical blocks get the same sparsity.

    Args:
        errors: (blocks, grid), measured errors, at least 0.
        grid: sparsities of the columns, ascending, in (0, 1). None is extrapolated: a block stays within the grid.
        sizes: prunable weights of every block.
        sparsity: of the whole model, within the grid.
        spread: how far a block's sparsity may lie from `sparsity`.

    Returns:
        A sparsity per block; their mean weighted by `sizes` is `sparsity` up to float64 rounding.

    Raises:
        ValueError: bad input.
    """
    _check(len(errors), sizes, sparsity, spread)
    if errors.shape != (len(sizes), len(grid)) or not (errors.isfinite().all() and (errors >= 0).all()):
        shape = f"{len(sizes)} x {len(grid)}"
        raise ValueError(f"errors: expected {shape} finite numbers, at least 0, got {tuple(errors.shape)}: {errors}")
    ascending = all(a < b for a, b in zip([0.0, *grid], [*grid, 1.0], strict=True))
    target = float(sparsity)
    if not ascending or not grid[0] <= target <= grid[-1]:
        raise ValueError(f"grid: expected ascending sparsities in (0, 1) around {target}, got {grid}")
    least, most = max(target - spread, grid[0]), min(target + spread, grid[-1])
    if least == most:
        return [target] * len(sizes)
    curves = _interpolate(errors.double().cpu(), grid, torch.linspace(least, most, CELLS + 1, dtype=torch.float64))
    rises = torch.tensor([_convex(rise.tolist()) for rise in curves.diff()], dtype=torch.float64)
    size = torch.tensor(sizes, dtype=torch.float64)[:, None]
    cost = rises / size
    # In units of one weight and one cell.
    needed = sum(sizes) * CELLS * ((target - least) / (most - least))
    order = cost.view(-1).argsort()
    removed = size.expand_as(cost).reshape(-1)[order].cumsum(0)
    multiplier = cost.view(-1)[order[torch.searchsorted(removed, needed)]]
    below, tied = (cost < multiplier).double(), (cost == multiplier).double()
    part = (needed - (size * below).sum()) / (size * tied).sum()
    cells = below.sum(1) + part * tied.sum(1)
    return (least + (most - least) * cells / CELLS).tolist()


def whole_budgets(
    sparsities: list[Fraction] | list[float], shapes: list[list[tuple[int, int]]], sparsity: Fraction, scope: str
) -> list[list[int | Tensor]]:
    """What every layer keeps, in whole weights; the model keeps exactly as many as under the uniform pattern.

    (1 - sparsity of its block) of every row or matrix, rounded by the largest remainder: all down, but not to 0, then
    one more per row, layer after layer, to those that lost most, until the total is reached. The last of them may get
    it in its first rows only. Equal sparsities give the uniform budgets.

    Args:
        sparsities: of every block; their mean weighted by size is `sparsity`.
        shapes: per block, (rows, d) of its layers.
        sparsity: of the uniform pattern, in (0, 1).
        scope: "row" (one budget per row) or "layer" (one for the whole matrix), see `patterns`.

    Returns:
        Per block and layer, what is kept: under "row" of each row, 1 to d, an int, or in at most one layer of the model
        an int64 tensor (rows,) on the CPU; under "layer" of the whole matrix, an int, 1 to rows d.

    Raises:
        ValueError: bad input.
    """
    if scope not in ("row", "layer"):
        raise ValueError(f"scope: expected row or layer, got {scope!r}")
    if any(rows < 1 or d < 1 for block in shapes for rows, d in block):
        raise ValueError(f"shapes: expected at least 1 x 1, got {shapes}")
    sizes = [sum(rows * d for rows, d in block) for block in shapes]
    _check(len(sparsities), sizes, sparsity)
    if not all(0 < s < 1 for s in sparsities):
        raise ValueError(f"sparsities: expected numbers in (0, 1), got {[float(s) for s in sparsities]}")
    exact = [Fraction(s) for s in sparsities]
    mean = _mean(exact, sizes)
    if abs(mean - sparsity) > MEAN_TOLERANCE:
        raise ValueError(f"sparsities: expected a mean of {float(sparsity)}, got {float(mean)}")
    pattern = Pattern(str(sparsity), sparsity, scope)
    total, rows, widths, ideal = 0, [], [], []
    for s, block in zip(exact, shapes, strict=True):
        for r, d in block:
            # A matrix under one budget is one long row.
            r, d = (r, d) if scope == "row" else (1, r * d)
            total += r * patterns.kept_in_row(pattern, d)
            rows.append(r)
            widths.append(d)
            ideal.append((1 - s) * d)
    budgets = iter(_round(ideal, rows, widths, total))
    return [[next(budgets) for _ in block] for block in shapes]


def _round(ideal: list[Fraction], rows: list[int], widths: list[int], total: int) -> list[int | Tensor]:
    """Integers near `ideal`, 1 to `widths`, that keep `total` over all rows.

    Args:
        ideal: kept per row of every layer, above 0 and below its width.
        rows, widths: of every layer.
        total: one per row at least, all at most.
    """
    budgets = [max(math.floor(k), 1) for k in ideal]
    left = total - sum(k * r for k, r in zip(budgets, rows, strict=True))
    by_loss = sorted(range(len(ideal)), key=lambda i: ideal[i] - budgets[i], reverse=True)
    # What the least of 1 has added to some is taken from all others; what that is too much is given back below.
    while left < 0:
        for i, k in enumerate(budgets):
            if k > 1:
                budgets[i] = k - 1
                left += rows[i]
    while left > 0:
        for i in by_loss:
            if left >= rows[i] and budgets[i] < widths[i]:
                budgets[i] += 1
                left -= rows[i]
            elif left > 0 and budgets[i] < widths[i]:
                budgets[i] = torch.full((rows[i],), budgets[i], dtype=torch.int64)
                budgets[i][:left] += 1
                left = 0
    return budgets


def _check(blocks: int, sizes: list[int], sparsity: Fraction, spread: float = 0.0) -> None:
    if not blocks or len(sizes) != blocks or min(sizes) < 1:
        raise ValueError(f"sizes: expected those of {blocks} blocks, at least 1 each, got {sizes}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a fraction in (0, 1), got {sparsity}")
    if not 0 <= spread < 1:
        raise ValueError(f"spread: expected a number in [0, 1), got {spread}")


def _mean(values: list[Fraction], sizes: list[int]) -> Fraction:
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _interpolate(errors: Tensor, grid: list[float], at: Tensor) -> Tensor:
    """(blocks, points): every block's error at the sparsities `at`, inside the grid. All float64."""
    knots = torch.tensor(grid, dtype=torch.float64)
    right = torch.searchsorted(knots, at).clamp(1, len(grid) - 1)
    a, b = errors[:, right - 1], errors[:, right]
    t = (at / knots[right - 1]).log() / (knots[right] / knots[right - 1]).log()
    straight = a + (b - a) * (at - knots[right - 1]) / (knots[right] - knots[right - 1])
    power = (a.log() + t * (b.log() - a.log())).exp()
    return torch.where((a > 0) & (b > 0), power, straight)


def _convex(rises: list[float]) -> list[float]:
    """Rises of the greatest convex curve below one with these rises: pool neighbours until they ascend."""
    means, counts = [], []
    for rise in rises:
        means.append(rise)
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] += (mean - means[-1]) * count / (counts[-1] + count)
            counts[-1] += count
    return [mean for mean, count in zip(means, counts, strict=True) for _ in range(count)]
