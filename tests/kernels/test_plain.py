"""Operations in plain torch, against their formulas in float64."""

import pytest
import torch
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    assert_near,
    assert_sums_near,
    copied,
    garbage,
    gram,
    in_float64,
    normal,
    shapes,
    uniform,
)

from sparsefw.estimate.live_bytes import LiveBytes
from sparsefw.kernels import plain


@pytest.fixture(params=["one block", "blocks"], autouse=True)
def height(request, monkeypatch):
    """All rows in one block, and a few rows in a block."""
    for name in ("BLOCK", "GPU_BLOCK") if request.param == "blocks" else ():
        monkeypatch.setattr(plain, name, 300)


def a_mask(rows, d):
    return uniform(rows, d, seed=4) < 0.4


def of_wider(X):
    """The same values as the right half of a matrix that is twice as wide."""
    return torch.cat((X, X), 1)[:, X.shape[1] :]


@shapes
@pytest.mark.parametrize("gap", [False, True])
def test_removed_is_rounded_once(gap, shape):
    for dtype in DTYPES:
        W, mask = normal(*shape, dtype=dtype), a_mask(*shape)
        target_gap = 0.1 * normal(*shape, seed=5) if gap else None
        truth = W.double() * ~mask + (target_gap.double() if gap else 0)
        E = plain.removed(W, mask, target_gap)
        assert E.dtype == (torch.float32 if gap else dtype)
        assert torch.equal(E, truth.to(E.dtype))
        out = garbage(*shape, dtype=torch.bfloat16)
        assert plain.removed(of_wider(W), of_wider(mask), target_gap, out=out) is out
        assert torch.equal(out, truth.float().bfloat16())


@shapes
@pytest.mark.parametrize("e_dtype", [torch.float32, torch.bfloat16])
def test_fits_begin_at_the_kept_weights(e_dtype, shape):
    for dtype in DTYPES:
        W, start, mask = normal(*shape, dtype=dtype), normal(*shape, seed=1), a_mask(*shape)
        # Entries outside of the mask do not matter.
        start[~mask] = torch.nan
        Z, E = plain.begin_fit(W, of_wider(start), of_wider(mask), dtype=e_dtype)
        assert (Z.dtype, E.dtype) == (torch.float32, e_dtype)
        assert torch.equal(Z, torch.where(mask, start, 0))
        assert torch.equal(E, (W.float() - Z).to(e_dtype))


@shapes
@pytest.mark.parametrize("fitted", [False, True])
def test_row_errors_are_sums_of_a_few_roundings(fitted, shape):
    for dtype in DTYPES:
        W, R, Z = normal(*shape, dtype=dtype), normal(*shape, seed=1), normal(*shape, seed=2) if fitted else None
        terms = (W.double() - (Z.double() if fitted else 0)) * R.double()
        assert_sums_near(plain.row_errors(of_wider(W), R, Z), terms)


def test_a_long_rows_rounding_does_not_grow_with_its_length():
    """All terms are positive: the sum of 28672 of them is as close as a few roundings."""
    E = uniform(3, 28672).bfloat16()
    R = E.float() * 3
    truth = (E.double() * R.double()).sum(1)
    # A sum term by term would be off by up to 28672 roundings of 2^-24.
    assert ((plain.row_errors(E, R).double() - truth).abs() <= 12 * 2.0**-24 * truth).all()


def formula_of_candidates(Z, R, mask, inverse, root, margin, support):
    moved = ~mask if support is None else ~mask & support
    candidate = Z + moved * R * inverse
    return candidate, candidate.abs() * root * (1 + (0 if margin is None else margin[:, None] * mask))


@shapes
@pytest.mark.parametrize(("margin", "support"), [(False, False), (True, True)])
def test_candidates(margin, support, shape):
    mask, diagonal = a_mask(*shape), gram(shape[1]).diagonal()
    given = dict(
        Z=normal(*shape) * mask, R=300 * normal(*shape, seed=1), mask=mask, inverse=1 / diagonal,
        root=diagonal.sqrt(), margin=uniform(shape[0], seed=5) if margin else None,
        support=uniform(*shape, seed=6) < 0.8 if support else None,
    )  # fmt: skip
    before, got = copied(given), plain.candidates(**given)
    truth = formula_of_candidates(**in_float64(given))
    for x, y, exact in zip(got, formula_of_candidates(**given), truth, strict=True):
        assert x.dtype == torch.float32
        assert_near(x, y, exact)
    assert torch.equal(got[0][mask], given["Z"][mask])
    for name, x in before.items():
        assert x is None or torch.equal(given[name], x), name
    # A row that overflows spoils no other.
    given["R"][0] = torch.nan
    for x, y in zip(plain.candidates(**given), got, strict=True):
        assert torch.equal(x[1:], y[1:])


def formula_of_bound_scores(W, R, M, target_gap, damping):
    gap = 0 if target_gap is None else target_gap
    r = R - (gap + W * (1 - M)) * (0 if damping is None else damping)
    return W * r, gap * r


@shapes
@pytest.mark.parametrize(("gap", "damping"), [(False, False), (True, False), (True, True), (False, True)])
def test_scores_of_the_bound(gap, damping, shape):
    given = dict(
        W=normal(*shape, dtype=torch.bfloat16), R=normal(*shape, seed=1), M=uniform(*shape, seed=2),
        target_gap=normal(*shape, seed=3) if gap else None, damping=uniform(shape[1], seed=4) if damping else None,
    )  # fmt: skip
    exact = in_float64(given)
    truth, terms = formula_of_bound_scores(**exact)
    score, constant = plain.bound_scores(**given)
    assert score.dtype == torch.float32
    assert_near(score, formula_of_bound_scores(**given | dict(W=given["W"].float()))[0], truth)
    # The terms are rounded before they are summed.
    size = exact["R"].abs()
    if damping:
        size = size + (((exact["target_gap"] if gap else 0) + exact["W"] * (1 - exact["M"])) * exact["damping"]).abs()
    bound = 8 * 2.0**-24 * (exact["target_gap"].abs() * size).sum(1) if gap else torch.zeros(shape[0], device=DEVICE)
    assert ((constant.double() - terms.sum(1)).abs() <= bound).all()


@shapes
def test_sums_of_the_bound(shape):
    score, M, V = normal(*shape), uniform(*shape, seed=2), a_mask(*shape)
    assert_sums_near(plain.bound_sums(score, M, V), score.double() * (1 + M.double() - 2 * V.double()))


@shapes
def test_the_lowest_kept_entry(shape):
    X, kept = normal(*shape), a_mask(*shape)
    kept[0] = False
    expected = X.masked_fill(~kept, torch.inf).amin(1)
    assert torch.equal(plain.lowest(X, kept), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU may sum the rows of another block in another order")
def test_blocks_change_no_bit(monkeypatch):
    """A row gives the same bits in every block."""
    W, R, Z = (normal(37, 131, seed=seed) for seed in range(3))
    M, mask = uniform(37, 131), a_mask(37, 131)
    ones, results = uniform(131), []
    for entries in (100, 1000, 1 << 20):
        monkeypatch.setattr(plain, "BLOCK", entries)
        results.append([
            plain.removed(W, mask, R), plain.row_errors(W, R, Z), *plain.candidates(Z * mask, R, mask, ones, ones),
            *plain.bound_scores(W, R, M, target_gap=Z, damping=ones), plain.bound_sums(R, M, mask),
        ])  # fmt: skip
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def test_temporaries_have_the_size_of_a_block(monkeypatch):
    """By the bytes that a GPU would hold, on the meta device: two fp32 matrices and a mask of a block at most."""
    monkeypatch.setattr(plain, "GPU_BLOCK", entries := 1 << 13)
    X, kept = (torch.empty(64, 1024, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bool))
    W, (column, row) = X.bfloat16(), (X[0].clone(), X[:, 0].clone())
    for run in (
        lambda: plain.removed(W, kept, X), lambda: plain.begin_fit(W, X, kept, dtype=W.dtype),
        lambda: plain.row_errors(W, X, X), lambda: plain.candidates(X, X, kept, column, column, margin=row),
        lambda: plain.candidates(X, X, kept, column, column, support=kept), lambda: plain.bound_sums(X, X, kept),
        lambda: plain.bound_scores(W, X, X, target_gap=X, damping=column), lambda: plain.lowest(X, kept),
    ):  # fmt: skip
        with LiveBytes() as count:
            results = run()
        assert max(count.points) - count.live <= 9 * entries + 4 * len(row)
        del results


def test_no_rows():
    X = torch.empty(0, 8, device=DEVICE)
    mask, vector = X > 0, torch.ones(8, device=DEVICE)
    results = [plain.removed(X, mask), *plain.begin_fit(X, X, mask), *plain.candidates(X, X, mask, vector, vector)]
    assert all(x.shape == (0, 8) for x in [*results, plain.bound_scores(X, X, X)[0]])
    assert plain.row_errors(X, X).shape == plain.bound_sums(X, X, mask).shape == plain.lowest(X, mask).shape == (0,)
