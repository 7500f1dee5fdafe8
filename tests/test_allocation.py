"""Allocation over blocks: worked by hand, against brute force, and exact to the last weight."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from sparsefw import patterns
from sparsefw.allocation import by_error, by_outliers, outlier_ratio, whole_budgets

HALF = Fraction(1, 2)
GRID = [0.4, 0.45, 0.5, 0.55, 0.6]


def test_outlier_ratio_by_hand():
    """Ten entries of mean 2: those above 3 * 2 are 7 and 6.5; 6 itself is not above."""
    layers = [torch.tensor([[7.0, 0.25], [6.0, 0.25]]), torch.tensor([[6.5, 0, 0], [0, 0, 0]])]
    assert outlier_ratio(layers, threshold=3) == 0.2
    assert outlier_ratio(layers, threshold=3.25) == 0.1
    assert outlier_ratio(layers) == 0.0


def test_outliers_are_told_by_the_mean_of_the_whole_block():
    """By itself each layer is flat; together one of them is all outliers."""
    layers = [torch.full((1, 2), 100.0), torch.full((9, 2), 1.0)]
    assert outlier_ratio(layers) == 0.1
    assert [outlier_ratio([S]) for S in layers] == [0.0, 0.0]


def test_outlier_ratio_of_zeros_and_of_a_sum_that_fp32_cannot_hold():
    assert outlier_ratio([torch.zeros(3, 4)]) == 0.0
    assert outlier_ratio([torch.tensor([[3e38, 3e38, 3e38], [0, 0, 0]])], threshold=1.5) == 0.5


@pytest.mark.parametrize(
    ("layers", "threshold", "match"),
    [
        ([], 5.0, "saliencies: expected at least one entry"),
        ([torch.empty(0, 4)], 5.0, "saliencies: expected at least one entry"),
        ([torch.ones(1, 1), torch.tensor([[math.nan]])], 5.0, "saliencies: expected finite"),
        ([torch.tensor([[math.inf]])], 5.0, "saliencies: expected finite"),
        ([torch.ones(1, 1)], 0.0, "threshold: expected a number above 0, got 0.0"),
        ([torch.ones(1, 1)], math.nan, "threshold: expected a number above 0, got nan"),
    ],
)
def test_outlier_ratio_refuses(layers, threshold, match):
    with pytest.raises(ValueError, match=match):
        outlier_ratio(layers, threshold=threshold)


def test_owl_by_hand():
    """r = (0, 1/8, 1/4), mean 1/8: densities 1/2 + (-1/8, 0, 1/8)."""
    assert by_outliers([1.0, 2.0, 3.0], [5, 5, 5], HALF, spread=0.125) == [Fraction(n, 8) for n in (5, 4, 3)]
    # Weighted mean (0 * 1 + 1/8 * 1 + 1/4 * 2) / 4 = 5/32.
    assert by_outliers([1.0, 2.0, 3.0], [1, 1, 2], HALF, spread=0.125) == [Fraction(n, 32) for n in (21, 17, 13)]


def test_owl_as_in_the_papers_code():
    ratios, sparsity, spread = torch.tensor([2.0, 7.5, 3.0, 4.25, 2.5], dtype=torch.float64), Fraction("0.7"), 0.08
    r = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    density = r - r.mean() + (1 - float(sparsity))
    got = by_outliers(ratios.tolist(), [3] * 5, sparsity)
    torch.testing.assert_close(torch.tensor([float(s) for s in got], dtype=torch.float64), 1 - density)
    percent = by_outliers((ratios * 100).tolist(), [3] * 5, sparsity)
    assert [float(s) for s in got] == [float(s) for s in percent]


def test_owl_gives_more_to_more_outliers_and_holds_the_budget():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        blocks = int(torch.randint(1, 9, (), generator=generator))
        ratios = torch.rand(blocks, generator=generator).tolist()
        sizes = torch.randint(1, 100, (blocks,), generator=generator).tolist()
        got = by_outliers(ratios, sizes, Fraction("0.6"))
        assert sum(s * n for s, n in zip(got, sizes, strict=True)) == Fraction("0.6") * sum(sizes)
        for a, b in itertools.permutations(range(blocks), 2):
            assert (ratios[a] > ratios[b]) == (got[a] < got[b])
        if blocks > 1:
            assert max(got) - min(got) == 2 * Fraction(0.08)


@pytest.mark.parametrize("ratios", [[0.0, 0.0], [0.3, 0.3]])
def test_owl_of_equal_blocks_is_uniform(ratios):
    assert by_outliers(ratios, [7, 2], Fraction("0.6")) == [Fraction("0.6")] * 2


@pytest.mark.parametrize(
    ("ratios", "sizes", "sparsity", "spread", "match"),
    [
        ([0.0, 1.0], [1, 1], Fraction("0.95"), 0.08, r"spread: 0.08 takes block 0 to a sparsity of 1.0300"),
        ([0.0, 1.0], [1, 1], Fraction("0.05"), 0.08, r"spread: 0.08 takes block 1 to a sparsity of -0.0300"),
        ([0.0, math.nan], [1, 1], HALF, 0.08, "ratios: expected finite numbers"),
        ([0.0, 1.0], [1], HALF, 0.08, r"sizes: expected those of 2 blocks, at least 1 each, got \[1\]"),
        ([0.0, 1.0], [1, 0], HALF, 0.08, r"sizes: expected those of 2 blocks, at least 1 each, got \[1, 0\]"),
        ([], [], HALF, 0.08, "sizes: expected those of 0 blocks"),
        ([0.0, 1.0], [1, 1], Fraction(1), 0.08, "sparsity: expected a fraction"),
        ([0.0, 1.0], [1, 1], HALF, -0.1, r"spread: expected a number in \[0, 1\), got -0.1"),
    ],
)
def test_owl_refuses(ratios, sizes, sparsity, spread, match):
    with pytest.raises(ValueError, match=match):
        by_outliers(ratios, sizes, sparsity, spread=spread)


def _total(errors, grid, s):
    """Sum of the blocks' errors at sparsities s (cases, blocks): power laws between grid points."""
    total = torch.zeros(len(s), dtype=torch.float64)
    for b in range(len(errors)):
        for i in range(len(grid) - 1):
            low, high = errors[b, i].item(), errors[b, i + 1].item()
            here = (s[:, b] >= grid[i]) & ((s[:, b] < grid[i + 1]) | (i == len(grid) - 2))
            x = s[here, b]
            if low == 0 or high == 0:
                total[here] += low + (high - low) * (x - grid[i]) / (grid[i + 1] - grid[i])
            else:
                total[here] += low * (x / grid[i]) ** (math.log(high / low) / math.log(grid[i + 1] / grid[i]))
    return total


def _brute_force(errors, grid, sizes, sparsity, spread, steps):
    """Least total error where all blocks but the last are on a fine grid and the last one takes the rest."""
    axis = torch.linspace(sparsity - spread, sparsity + spread, steps + 1, dtype=torch.float64).clamp(grid[0], grid[-1])
    first = torch.cartesian_prod(*[axis] * (len(sizes) - 1)).view(-1, len(sizes) - 1)
    size = torch.tensor(sizes, dtype=torch.float64)
    last = (sparsity * size.sum() - first @ size[:-1]) / size[-1]
    s = torch.cat([first, last[:, None]], 1)
    s = s[(last >= axis[0]) & (last <= axis[-1])]
    return _total(errors, grid, s).min().item()


def _power_laws(blocks, seed):
    """Errors c s^p with exponents 2 to 6 that grow along the grid, as convex as measured ones."""
    generator = torch.Generator().manual_seed(seed)
    rand = torch.rand(blocks, 2, generator=generator, dtype=torch.float64)
    grid = torch.tensor(GRID, dtype=torch.float64)
    scale, exponent = rand[:, :1].exp(), 2 + 3 * rand[:, 1:]
    return scale * grid ** (exponent + grid)


@pytest.mark.parametrize(("sizes", "steps"), [([5, 5], 4000), ([9, 2], 4000), ([4, 4, 4], 250), ([1, 5, 3], 250)])
@pytest.mark.parametrize("spread", [0.03, 0.1])
def test_error_is_least(sizes, steps, spread):
    """No point of a fine grid is better."""
    inner = 0
    for seed in range(5):
        errors = _power_laws(len(sizes), seed)
        got = by_error(errors, GRID, sizes, HALF, spread=spread)
        assert sum(s * n for s, n in zip(got, sizes, strict=True)) == pytest.approx(0.5 * sum(sizes), abs=1e-12)
        assert all(abs(s - 0.5) <= spread + 1e-12 for s in got)
        total = _total(errors, GRID, torch.tensor([got], dtype=torch.float64)).item()
        best = _brute_force(errors, GRID, sizes, 0.5, spread, steps)
        assert total <= best * (1 + 1e-6)
        assert total < errors[:, 2].sum()
        inner += sum(abs(s - 0.5) < spread - 1e-3 for s in got) > 1
    # Not all of them may end at the bounds, or the multiplier is not tested.
    assert inner > 1 or spread < 0.1


def test_error_of_a_power_law_by_hand():
    """Errors s^3 and c s^3 cost the same at s_1 / s_2 = sqrt(c); the grid is no part of the answer."""
    grid = torch.tensor([0.3, 0.6, 0.7], dtype=torch.float64)
    ratio = 1.21
    errors = torch.stack([grid**3, ratio * grid**3])
    got = by_error(errors, grid.tolist(), [6, 6], HALF, spread=0.2)
    second = 1 / (1 + math.sqrt(ratio))
    assert got == pytest.approx([1 - second, second], abs=0.4 / 1024)


def test_error_per_weight_counts():
    """A block of twice the size and twice the error is as sparse as the other."""
    errors = _power_laws(1, 0)
    assert by_error(torch.cat([errors, 2 * errors]), GRID, [3, 6], HALF) == pytest.approx([0.5] * 2, abs=2e-4)
    small, large = by_error(torch.cat([errors, errors]), GRID, [3, 6], HALF)
    assert small < 0.5 < large


def test_error_of_identical_blocks_is_uniform():
    for shape in [(37, 131), (40, 10)]:
        errors = _power_laws(1, 3).expand(4, -1)
        for curve in (errors, torch.zeros(4, 5), torch.ones(4, 5), torch.linspace(0, 1, 5).sqrt().expand(4, -1)):
            got = by_error(curve, GRID, [shape[0] * shape[1]] * 4, HALF)
            assert got == pytest.approx([0.5] * 4, abs=1e-14)
            for scope in ("row", "layer"):
                assert whole_budgets(got, [[shape]] * 4, HALF, scope) == _uniform([[shape]] * 4, HALF, scope)


def test_blocks_that_cost_nothing_go_first():
    errors = torch.stack([torch.zeros(5), torch.full((5,), 3.0), torch.tensor([0.0, 0, 0, 1, 3])]).double()
    flat_a, flat_b, dear = by_error(errors, GRID, [4, 4, 4], HALF, spread=0.1)
    assert dear <= 0.5
    assert by_error(errors[1:], GRID, [4, 4], HALF, spread=0.1) == pytest.approx([0.5, 0.5], abs=0.05 + 1e-9)
    steep = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6], dtype=torch.float64)
    got = by_error(torch.stack([errors[0], steep, errors[1]]), GRID, [1, 2, 1], HALF, spread=0.1)
    assert got == pytest.approx([0.6, 0.4, 0.6], abs=1e-12)
    assert flat_a == pytest.approx(flat_b)


def test_error_zero_to_positive_is_a_straight_line():
    """Free up to 0.5, then slopes 10 and 1: the second block takes what the first may not."""
    errors = torch.tensor([[0.0, 0, 0, 0.5, 1.0], [0.0, 0.05, 0.1, 0.15, 0.2]])
    assert by_error(errors, GRID, [1, 1], Fraction("0.52"), spread=0.08) == pytest.approx([0.5, 0.54], abs=2e-4)


def test_a_curve_with_a_bump_is_cut_to_its_convex_part():
    """The middle of block 0 is noise: the straight line below it is steeper than block 1 everywhere."""
    errors = torch.tensor([[0.0, 3.9, 3.95, 3.97, 4.0], [1.0, 1.5, 2.0, 2.5, 3.0]]).double()
    assert by_error(errors, GRID, [1, 1], HALF, spread=0.1) == pytest.approx([0.4, 0.6], abs=1e-12)


def test_no_spread_and_the_ends_of_the_grid():
    errors = _power_laws(3, 1)
    assert by_error(errors, GRID, [1, 2, 3], HALF, spread=0) == [0.5] * 3
    assert by_error(errors, GRID, [1, 2, 3], Fraction("0.4")) == [0.4] * 3
    assert by_error(errors, GRID, [1, 2, 3], Fraction("0.6")) == pytest.approx([0.6] * 3, abs=1e-14)
    assert all(0.4 <= s <= 0.6 for s in by_error(errors, GRID, [1, 2, 3], HALF, spread=0.3))


@pytest.mark.parametrize(
    ("errors", "grid", "sparsity", "match"),
    [
        (torch.ones(2, 3), [0.4, 0.5], HALF, "errors: expected 2 x 2 finite numbers"),
        (torch.tensor([[1.0, 2], [1, math.nan]]), [0.4, 0.6], HALF, "errors: expected 2 x 2 finite numbers"),
        (torch.tensor([[1.0, 2], [-1, 2]]), [0.4, 0.6], HALF, "errors: expected 2 x 2 finite numbers"),
        (torch.ones(2, 2), [0.6, 0.4], HALF, "grid: expected ascending"),
        (torch.ones(2, 2), [0.0, 0.6], HALF, "grid: expected ascending"),
        (torch.ones(2, 2), [0.4, 1.0], HALF, "grid: expected ascending"),
        (torch.ones(2, 2), [0.4, 0.6], Fraction("0.7"), r"around 0.7, got \[0.4, 0.6\]"),
        (torch.ones(3, 2), [0.4, 0.6], HALF, "sizes: expected those of 3 blocks"),
    ],
)
def test_error_refuses(errors, grid, sparsity, match):
    with pytest.raises(ValueError, match=match):
        by_error(errors, grid, [1, 1], sparsity)


def _uniform(shapes, sparsity, scope):
    pattern = patterns.Pattern("", sparsity, scope)
    if scope == "row":
        return [[patterns.kept_in_row(pattern, d) for _, d in block] for block in shapes]
    return [[patterns.kept_in_layer(pattern, rows, d) for rows, d in block] for block in shapes]


def _kept(budgets, shapes, scope):
    """Weights kept in the whole model."""
    total = 0
    for block, layers in zip(budgets, shapes, strict=True):
        for k, (rows, _) in zip(block, layers, strict=True):
            total += int(k.sum()) if isinstance(k, torch.Tensor) else k * (rows if scope == "row" else 1)
    return total


def _random_shapes(generator, largest):
    def draw(high):
        return int(torch.randint(1, high + 1, (), generator=generator))

    return [[(draw(largest), draw(largest)) for _ in range(draw(4))] for _ in range(draw(6))]


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("largest", [3, 60])
@pytest.mark.parametrize("text", ["0.05", "0.5", "0.6", "0.97"])
def test_totals_are_exact(scope, largest, text):
    """Random odd shapes, blocks of any size, sparsities of both kinds."""
    sparsity = Fraction(text)
    split = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        shapes = _random_shapes(generator, largest)
        sizes = [sum(rows * d for rows, d in block) for block in shapes]
        ratios = torch.rand(len(shapes), generator=generator).tolist()
        exact = by_outliers(ratios, sizes, sparsity, spread=float(min(sparsity, 1 - sparsity)) / 3)
        for sparsities in (exact, [float(s) for s in exact]):
            budgets = whole_budgets(sparsities, shapes, sparsity, scope)
            assert _kept(budgets, shapes, scope) == _kept(_uniform(shapes, sparsity, scope), shapes, scope)
            tensors = [k for block in budgets for k in block if isinstance(k, torch.Tensor)]
            assert len(tensors) <= (scope == "row")
            split += len(tensors)
            for s, block, layers in zip(exact, budgets, shapes, strict=True):
                for k, (rows, d) in zip(block, layers, strict=True):
                    width = d if scope == "row" else rows * d
                    low, high = (int(k.min()), int(k.max())) if isinstance(k, torch.Tensor) else (k, k)
                    assert 1 <= low <= high <= width
                    # The uniform pattern keeps up to one more per row than its density, and the least of one may
                    # take as much again from wide layers; on tiny shapes both add up.
                    assert abs(low - float(1 - s) * width) < (2 if largest == 60 else 3)
                    if isinstance(k, torch.Tensor):
                        assert (k.dtype, k.shape, high - low) == (torch.int64, (rows,), 1)
                        assert k.tolist() == sorted(k.tolist(), reverse=True)
    assert split or scope == "layer" or largest == 3, "no case with a tensor"


def test_largest_remainder_by_hand():
    """Uniform keeps 5 of 10 in all 7 rows, 35 weights. Sparsities 0.54 and 0.47 give 4.6 and 5.3 per row.

    Rounded down that is 4 and 5, 32 in all. The three left over go to block 0, which lost more.
    """
    moved = [HALF + Fraction("0.04"), HALF - Fraction("0.03")]
    assert whole_budgets(moved, [[(3, 10)], [(4, 10)]], HALF, "row") == [[5], [5]]
    # 0.08 and 0.06: 4.2 and 5.6 per row, floors 4 and 5; three left over go to the first rows of block 1.
    moved = [HALF + Fraction("0.08"), HALF - Fraction("0.06")]
    [[first], [second]] = whole_budgets(moved, [[(3, 10)], [(4, 10)]], HALF, "row")
    assert (first, second.tolist()) == (4, [6, 6, 6, 5])
    # As whole matrices: 15 - 2.4 and 20 + 2.4.
    assert whole_budgets(moved, [[(3, 10)], [(4, 10)]], HALF, "layer") == [[13], [22]]


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_equal_sparsities_give_the_uniform_budgets(scope):
    """Also where the float lies on either side of the fraction."""
    shapes = [[(37, 131), (5, 10), (64, 3)], [(1, 1), (7, 100)], [(131, 37)]]
    for text in ("0.6", "0.29", "0.7", "0.5"):
        sparsity = Fraction(text)
        around = [math.nextafter(float(text), 0), float(text), math.nextafter(float(text), 1)]
        for sparsities in ([sparsity] * 3, around, around[::-1]):
            assert whole_budgets(sparsities, shapes, sparsity, scope) == _uniform(shapes, sparsity, scope)


def test_a_denser_block_keeps_more():
    shapes = [[(37, 131), (20, 64)]] * 3
    budgets = whole_budgets([0.65, 0.6, 0.55], shapes, Fraction("0.6"), "row")
    for sparse, middle, dense in zip(*budgets, strict=True):
        assert torch.as_tensor(sparse).max() < torch.as_tensor(middle).min()
        assert torch.as_tensor(middle).max() < torch.as_tensor(dense).min()


def test_at_least_one_is_kept_at_the_expense_of_others():
    """Block 0 would keep 0.4 of 2 per row and keeps 1; the 10 rows' 6 weights come out of block 1."""
    shapes = [[(10, 2)], [(1, 80)]]
    budgets = whole_budgets([Fraction("0.8"), Fraction("0.425")], shapes, HALF, "row")
    assert budgets == [[1], [40]]
    # 23 and 5.75 with 1 in block 0 are 3 too many: 22 and 4, and of the 2 left over none for block 0.
    budgets = whole_budgets([Fraction("0.8"), Fraction("0.425")], [[(10, 2)], [(1, 40), (4, 10)]], HALF, "row")
    assert (budgets[0], budgets[1][0], budgets[1][1].tolist()) == ([1], 22, [5, 5, 4, 4])
    # Both end at the least there is.
    assert whole_budgets([0.875, 0.5], [[(10, 4)], [(5, 4)]], Fraction("0.75"), "row") == [[1], [1]]
    crowded = [[(10, 2)], [(10, 2)], [(20, 20)]]
    sparsities = [Fraction("0.999"), Fraction("0.999"), HALF - 40 * Fraction("0.499") / 400]
    budgets = whole_budgets(sparsities, crowded, HALF, "row")
    assert budgets[:2] == [[1], [1]]
    assert _kept(budgets, crowded, "row") == 220


def test_none_is_kept_beyond_a_row():
    """Uniform keeps 35: 2 of 3 in ten rows and 15. 2.7 of 3 and 3 of 30, rounded down, leave 12 over.

    Ten of them fill block 0, the other two go to the one row that still has room.
    """
    budgets = whole_budgets([Fraction("0.1"), Fraction("0.9")], [[(2, 3), (8, 3)], [(1, 30)]], HALF, "row")
    assert budgets == [[3, 3], [5]]
    budgets = whole_budgets([Fraction("0.1"), Fraction("0.9")], [[(8, 3), (2, 3)], [(1, 30)]], HALF, "row")
    assert budgets == [[3, 3], [5]]


@pytest.mark.parametrize(
    ("sparsities", "shapes", "sparsity", "scope", "match"),
    [
        ([HALF], [[(2, 2)]], HALF, "group", "scope: expected row or layer, got 'group'"),
        ([HALF], [[(2, 0)]], HALF, "row", "shapes: expected at least 1 x 1"),
        ([HALF], [[]], HALF, "row", r"sizes: expected those of 1 blocks, at least 1 each, got \[0\]"),
        ([HALF, HALF], [[(2, 2)]], HALF, "row", "sizes: expected those of 2 blocks"),
        ([HALF], [[(2, 2)]], Fraction(1), "row", "sparsity: expected a fraction"),
        ([0.5, 0.6], [[(2, 2)], [(2, 2)]], HALF, "row", "sparsities: expected a mean of 0.5, got 0.55"),
        ([0.0, 1.0], [[(2, 2)], [(2, 2)]], HALF, "row", r"sparsities: expected numbers in \(0, 1\), got \[0.0, 1.0\]"),
        ([math.nan], [[(2, 2)]], HALF, "row", r"sparsities: expected numbers in \(0, 1\), got \[nan\]"),
    ],
)
def test_whole_budgets_refuses(sparsities, shapes, sparsity, scope, match):
    with pytest.raises(ValueError, match=match):
        whole_budgets(sparsities, shapes, sparsity, scope)
