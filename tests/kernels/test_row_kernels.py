"""Copies of rows, rounding of masks, and steps of Adam, against the specification."""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import DEVICE, DTYPES, assert_near, normal, shapes, uniform


def of_wider(X):
    """The same values as the right half of a matrix that is twice as wide."""
    return torch.cat((X, X), 1)[:, X.shape[1] :]


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
    vector = torch.ones(8, device=DEVICE)
    row_backend.take_rows(X, X, X[:, 0] > 0)
    row_backend.adam_step(vector, vector, *[X[:, 0].int(), *3 * [X[:, 0]]], rate=0.1, step=1)
    assert row_backend.round_mask(X, X, 3).shape == (0, 8)
    assert (vector == 1).all()
