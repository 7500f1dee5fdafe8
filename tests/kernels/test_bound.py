"""bound_scores and bound_sums against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    SHAPES,
    assert_near,
    assert_sums_near,
    gram,
    in_float64,
    normal,
    uniform,
)

from sparsefw.kernels import naive, naive_fits
from sparsefw.kernels.bound import bound_scores, bound_sums


def arguments(rows, d, *, gap=True, damping=True, dtype=torch.float32):
    return dict(
        W=normal(rows, d, dtype=dtype), R=normal(rows, d, seed=1), M=uniform(rows, d, seed=2),
        target_gap=normal(rows, d, seed=3) if gap else None, damping=uniform(d, seed=4) if damping else None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("gap", [False, True])
def test_scores_are_as_close_to_float64_as_naive(row_backend, gap, damping, shape):
    for dtype in DTYPES:
        given = arguments(*shape, gap=gap, damping=damping, dtype=dtype)
        exact = in_float64(given)
        plain, truth = naive_fits.bound_scores(**given), naive_fits.bound_scores(**exact)
        score, constant = row_backend.bound_scores(**given)
        assert score.dtype == torch.float32
        assert_near(score, plain[0], truth[0])
        # The terms are rounded before they are summed.
        removed, damped = (exact["target_gap"] if gap else 0) + exact["W"] * (1 - exact["M"]), exact["damping"]
        r = exact["R"] - (removed * damped if damping else 0)
        size = exact["R"].abs() + (removed * damped if damping else 0 * removed).abs()
        bound = 8 * 2.0**-24 * ((exact["target_gap"] if gap else 0 * r).abs() * size).sum(1)
        assert ((constant.double() - ((exact["target_gap"] if gap else 0 * r) * r).sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
def test_sums_of_a_few_roundings(row_backend, shape):
    score, M, V = normal(*shape), uniform(*shape, seed=2), uniform(*shape, seed=5) < 0.4
    terms = score.double() * (1 + M.double() - 2 * V.double())
    assert_sums_near(row_backend.bound_sums(score, M, V), terms)
    assert_sums_near(naive_fits.bound_sums(score, M, V), terms)


@pytest.mark.parametrize("damp", [0.0, 0.2])
def test_specification_is_the_tangent_of_the_error(damp):
    """error(M) - <gradient, M - V>, by autograd, for a target other than W."""
    W, gap, M = normal(5, 17).double(), 0.3 * normal(5, 17, seed=3).double(), uniform(5, 17, seed=2).double()
    G, damping = gram(17).double(), damp * torch.arange(17, device=DEVICE).double()
    H = G + damping.diag()
    M.requires_grad_()
    E = gap + W * (1 - M)
    error = (E * (E @ G)).sum(1)
    (gradient,) = torch.autograd.grad(error.sum(), M)
    R = (E @ H).detach()
    score, constant = naive_fits.bound_scores(W, R, M.detach(), target_gap=gap, damping=damping if damp else None)
    torch.testing.assert_close(score, -gradient / 2)
    V = naive.lmo(score, 6, positive=True)
    tangent = error.detach() - (gradient * (M.detach() - V.double())).sum(1)
    torch.testing.assert_close(naive_fits.bound_sums(score, M.detach(), V) + constant, tangent)


def test_no_rows(row_backend):
    score, constant = row_backend.bound_scores(**arguments(0, 7))
    assert (score.shape, constant.shape) == ((0, 7), (0,))
    assert row_backend.bound_sums(score, score, score > 0).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(W=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "W: expected torch.float32"),
        (dict(R=torch.zeros(4, 3)), ValueError, r"R: expected shape \(3, 4\)"),
        (dict(M=torch.zeros(4, 3).T), ValueError, "M: expected contiguous rows"),
        (dict(target_gap=torch.zeros(3, 4).bool()), TypeError, "target_gap: expected torch.float32"),
        (dict(damping=torch.zeros(3)), ValueError, r"damping: expected shape \(4,\)"),
    ],
)
def test_bad_input_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        bound_scores(**arguments(3, 4) | {name: x.to(DEVICE) for name, x in change.items()})
    if "M" in change:
        zeros = torch.zeros(3, 4, device=DEVICE)
        with pytest.raises(error, match=match):
            bound_sums(zeros, change["M"].to(DEVICE), zeros > 0)
