"""Operations that pass over the rows of matrices once, against the specification in float64."""

import pytest
import torch
from helpers import naive
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


def a_mask(rows, d):
    return uniform(rows, d, seed=4) < 0.4


def of_wider(X):
    """The same values as the right half of a matrix that is twice as wide."""
    return torch.cat((X, X), 1)[:, X.shape[1] :]


@shapes
@pytest.mark.parametrize("gap", [False, True])
def test_removed_is_rounded_once(row_backend, gap, shape):
    for dtype in DTYPES:
        W, mask = normal(*shape, dtype=dtype), a_mask(*shape)
        target_gap = 0.1 * normal(*shape, seed=5) if gap else None
        truth = naive.removed(W.double(), mask, None if target_gap is None else target_gap.double())
        E = row_backend.removed(W, mask, target_gap)
        assert E.dtype == (torch.float32 if gap else dtype)
        assert torch.equal(E, truth.to(E.dtype))
        out = garbage(*shape, dtype=torch.bfloat16)
        assert row_backend.removed(of_wider(W), of_wider(mask), target_gap, out=out) is out
        assert torch.equal(out, truth.float().bfloat16())


@shapes
@pytest.mark.parametrize("e_dtype", [torch.float32, torch.bfloat16])
def test_fits_begin_at_the_kept_weights(row_backend, e_dtype, shape):
    for dtype in DTYPES:
        W, start, mask = normal(*shape, dtype=dtype), normal(*shape, seed=1), a_mask(*shape)
        # Entries outside of the mask are not read.
        start[~mask] = torch.nan
        Z, E = row_backend.begin_fit(W, of_wider(start), of_wider(mask), dtype=e_dtype)
        assert (Z.dtype, E.dtype) == (torch.float32, e_dtype)
        assert torch.equal(Z, torch.where(mask, start, 0))
        assert torch.equal(E, (W.float() - Z).to(e_dtype))


@shapes
@pytest.mark.parametrize("minus", [*DTYPES, None])
def test_row_errors_are_sums_of_a_few_roundings(row_backend, minus, shape):
    W, R = normal(*shape, dtype=torch.bfloat16), normal(*shape, seed=1)
    Z = None if minus is None else normal(*shape, seed=2, dtype=minus)
    terms = (W.double() - (0 if Z is None else Z.double())) * R.double()
    assert_sums_near(row_backend.row_errors(of_wider(W), R, Z), terms)
    assert_sums_near(naive.row_errors(W, R, Z), terms)


def test_a_long_rows_rounding_does_not_grow_with_its_length(row_backend):
    """All terms are positive: the sum of 28672 of them is as close as a few roundings."""
    E = uniform(3, 28672).bfloat16()
    R = E.float() * 3
    truth = (E.double() * R.double()).sum(1)
    # A sum term by term would be off by up to 28672 roundings of 2^-24.
    assert ((row_backend.row_errors(E, R).double() - truth).abs() <= 12 * 2.0**-24 * truth).all()


@shapes
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_rows_that_are_taken(row_backend, dtype, shape):
    X, Y = (normal(*shape, seed=n) > 0 if dtype == torch.bool else normal(*shape, seed=n, dtype=dtype) for n in (0, 1))
    if dtype.is_floating_point:
        # NaN moves with its row only.
        Y[0], X[-1] = torch.nan, torch.nan
    for share in (0.0, 0.4, 1.0):
        taken, got, same = uniform(shape[0], seed=3) < share, of_wider(X), X.clone()
        naive.take_rows(same, Y, taken)
        row_backend.take_rows(got, Y, taken)
        expected = torch.where(taken[:, None], Y, X)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(same, expected, rtol=0, atol=0, equal_nan=True)


@shapes
@pytest.mark.parametrize(("margin", "support"), [(False, False), (True, True)])
def test_candidates_are_as_close_to_float64_as_naive(row_backend, margin, support, shape):
    mask, diagonal = a_mask(*shape), gram(shape[1]).diagonal()
    given = dict(
        Z=normal(*shape) * mask, R=300 * normal(*shape, seed=1), mask=mask, inverse=1 / diagonal,
        root=diagonal.sqrt(), margin=uniform(shape[0], seed=5) if margin else None,
        support=uniform(*shape, seed=6) < 0.8 if support else None,
    )  # fmt: skip
    before = copied(given)
    got, plain = row_backend.candidates(**given), naive.candidates(**given)
    for x, y, truth in zip(got, plain, naive.candidates(**in_float64(given)), strict=True):
        assert x.dtype == torch.float32
        assert_near(x, y, truth)
    assert torch.equal(got[0][mask], given["Z"][mask])
    for name, x in before.items():
        assert x is None or torch.equal(given[name], x), name
    # A row that overflows spoils no other.
    given["R"][0] = torch.nan
    for x, y in zip(row_backend.candidates(**given), got, strict=True):
        assert torch.equal(x[1:], y[1:])


@shapes
@pytest.mark.parametrize(("gap", "damping"), [(False, False), (True, False), (True, True), (False, True)])
def test_scores_of_the_bound(row_backend, gap, damping, shape):
    given = dict(
        W=normal(*shape, dtype=torch.bfloat16), R=normal(*shape, seed=1), M=uniform(*shape, seed=2),
        target_gap=normal(*shape, seed=3) if gap else None, damping=uniform(shape[1], seed=4) if damping else None,
    )  # fmt: skip
    exact = in_float64(given)
    plain, truth = naive.bound_scores(**given), naive.bound_scores(**exact)
    score, constant = row_backend.bound_scores(**given)
    assert score.dtype == torch.float32
    assert_near(score, plain[0], truth[0])
    # The terms are rounded before they are summed.
    size = exact["R"].abs()
    if damping:
        size = size + (((exact["target_gap"] if gap else 0) + exact["W"] * (1 - exact["M"])) * exact["damping"]).abs()
    bound = 8 * 2.0**-24 * (exact["target_gap"].abs() * size).sum(1) if gap else torch.zeros(shape[0], device=DEVICE)
    assert ((constant.double() - truth[1]).abs() <= bound).all()


@shapes
def test_sums_of_the_bound(row_backend, shape):
    score, M, V = normal(*shape), uniform(*shape, seed=2), a_mask(*shape)
    terms = score.double() * (1 + M.double() - 2 * V.double())
    assert_sums_near(row_backend.bound_sums(score, M, V), terms)
    assert_sums_near(naive.bound_sums(score, M, V), terms)


def relaxed(rows, d):
    """Masks as a solve leaves them: some binary, some with ties at a fraction, some of all values."""
    M = uniform(rows, d)
    kind = torch.arange(rows, device=DEVICE)[:, None] % 4
    M = torch.where(kind == 0, (M < 0.4).float(), M)
    M = torch.where(kind == 1, (4 * M).round() / 4, M)
    return torch.where(kind == 2, torch.full_like(M, 0.25), M).contiguous()


def saliencies(rows, d):
    # Few values, so that they tie, too.
    return (3 * uniform(rows, d, seed=1)).round()


@shapes
def test_rounding(row_backend, shape):
    M, saliency = relaxed(*shape), saliencies(*shape)
    k = (shape[1] * uniform(shape[0], seed=2)).long()
    k[0], k[-1] = 0, shape[1]
    for budget in (int(0.4 * shape[1]), k):
        expected = naive.round_mask(M, saliency, budget)
        assert torch.equal(row_backend.round_mask(M, saliency, budget), expected)
        assert (expected.sum(1) == budget).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (16, 32), (1, 1)])
def test_rounding_of_groups(row_backend, n, m):
    M, saliency = relaxed(37, 5 * m), saliencies(37, 5 * m)
    before = M.clone(), saliency.clone()
    expected = naive.round_mask(M, saliency, n, group=m)
    assert torch.equal(row_backend.round_mask(M, saliency, n, group=m), expected)
    assert torch.equal(M, before[0])
    assert torch.equal(saliency, before[1])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("entries", [1, 3000])
def test_a_step_of_adam(backend, entries, index_dtype, monkeypatch):
    """Some steps in a row, the third of which has no gradient and one of which has gradients whose squares vanish."""
    # As many entries a program as on a GPU.
    monkeypatch.setattr("sparsefw.kernels.adam.platform", lambda: "sm_80")
    for dtype in DTYPES:
        W = normal(entries, dtype=dtype)
        index = torch.nonzero(uniform(entries, seed=1) < 0.9).flatten().to(index_dtype)
        weight, m, v = W[index.long()].float(), *torch.zeros(2, len(index), device=DEVICE)
        truth = [x.double() for x in (W, weight, m, v)]
        plain = [x.clone() for x in (W, weight, m, v)]
        expected = W.clone()
        for step, size in enumerate((1.0, 1e-3, 0.0, 1e-22, 10.0), 1):
            gradient = (size * normal(entries, seed=step)).to(dtype)
            backend.adam_step(W, gradient, index, weight, m, v, rate=0.01, step=step)
            naive.adam_step(plain[0], gradient, index, *plain[1:], rate=0.01, step=step)
            naive.adam_step(truth[0], gradient, index, *truth[1:], rate=0.01, step=step)
            list(map(assert_near, (weight, m, v), plain[1:], truth[1:]))
            assert torch.equal(W, expected.index_copy_(0, index.long(), weight.to(dtype)))


def test_no_rows(row_backend):
    X = torch.empty(0, 8, device=DEVICE)
    mask, vector = X > 0, torch.ones(8, device=DEVICE)
    row_backend.take_rows(X, X, mask[:, 0].clone())
    row_backend.adam_step(vector, vector, *[X[:, 0].int(), *3 * [X[:, 0]]], rate=0.1, step=1)
    results = [
        *(row_backend.removed(X, mask), *row_backend.begin_fit(X, X, mask), row_backend.round_mask(X, X, 3)),
        *(row_backend.candidates(X, X, mask, vector, vector)[0], row_backend.bound_scores(X, X, X)[0]),
    ]
    assert all(x.shape == (0, 8) for x in results)
    assert (vector == 1).all()
    assert row_backend.row_errors(X, X).shape == row_backend.bound_sums(X, X, mask).shape == (0,)
