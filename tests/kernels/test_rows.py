"""row_errors and take_rows against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, SHAPES, assert_sums_near, normal, uniform

from sparsefw.kernels import naive_fits
from sparsefw.kernels.rows import row_errors, take_rows


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
@pytest.mark.parametrize("minus", [*DTYPES, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_errors_are_sums_of_a_few_roundings(row_backend, dtype, minus, shape):
    W, R = normal(*shape, dtype=dtype), normal(*shape, seed=1)
    Z = None if minus is None else normal(*shape, seed=2, dtype=minus)
    terms = (W.double() - (0 if Z is None else Z.double())) * R.double()
    assert_sums_near(row_backend.row_errors(W, R, Z), terms)
    assert_sums_near(naive_fits.row_errors(W, R, Z), terms)


def test_specification_of_row_errors():
    W, R, Z = (normal(5, 7, seed=n).double() for n in range(3))
    expected = torch.stack([torch.dot(w - z, r) for w, z, r in zip(W, Z, R, strict=True)])
    torch.testing.assert_close(naive_fits.row_errors(W, R, Z), expected)
    torch.testing.assert_close(naive_fits.row_errors(W, R), torch.stack([w @ r for w, r in zip(W, R, strict=True)]))


def test_a_long_rows_rounding_does_not_grow_with_its_length(row_backend):
    """All terms are positive: the sum of 28672 of them is as close as a few roundings."""
    E = uniform(3, 28672).bfloat16()
    R = E.float() * 3
    truth = (E.double() * R.double()).sum(1)
    # A sum term by term would be off by up to 28672 roundings of 2^-24.
    assert ((row_backend.row_errors(E, R).double() - truth).abs() <= 12 * 2.0**-24 * truth).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_rows_that_are_taken(row_backend, dtype, share, shape):
    X, Y = (normal(*shape, seed=n) > 0 if dtype == torch.bool else normal(*shape, seed=n, dtype=dtype) for n in (0, 1))
    taken = uniform(shape[0], seed=3) < share
    expected, before = torch.where(taken[:, None], Y, X), Y.clone()
    same = X.clone()
    naive_fits.take_rows(same, Y, taken)
    row_backend.take_rows(X, Y, taken)
    assert torch.equal(X, expected)
    assert torch.equal(same, expected)
    assert torch.equal(Y, before)


def test_nan_moves_with_its_row_only(row_backend):
    X, Y = normal(7, 131), normal(7, 131, seed=1)
    Y[2], Y[3] = torch.nan, torch.nan
    taken = torch.arange(7, device=DEVICE) == 3
    row_backend.take_rows(X, Y, taken)
    assert X.isnan().any(1).tolist() == taken.tolist()


def test_rows_of_wider_matrices(row_backend):
    wide, other = normal(37, 200), normal(37, 200, seed=1)
    part, around = wide[:, 9:140], wide.clone()
    taken = uniform(37) < 0.5
    expected = (part * other[:, 9:140]).double().sum(1)
    torch.testing.assert_close(row_backend.row_errors(part, other[:, 9:140]).double(), expected, rtol=0, atol=1e-4)
    row_backend.take_rows(part, other[:, 9:140], taken)
    around[taken, 9:140] = other[taken, 9:140]
    assert torch.equal(wide, around)


def test_no_rows(row_backend):
    X = torch.empty(0, 7, device=DEVICE)
    assert row_backend.row_errors(X, X).shape == (0,)
    row_backend.take_rows(X, X, torch.empty(0, dtype=torch.bool, device=DEVICE))


ZEROS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("operation", "arguments", "error", "match"),
    [
        (row_errors, (ZEROS, ZEROS.bfloat16()), TypeError, "R: expected torch.float32"),
        (row_errors, (ZEROS, torch.zeros(4, 3).T), ValueError, "R: expected contiguous rows"),
        (row_errors, (ZEROS, ZEROS, torch.zeros(4, 4)), ValueError, r"Z: expected shape \(3, 4\)"),
        (take_rows, (ZEROS, ZEROS.bfloat16(), ZEROS[:, 0] > 0), TypeError, "Y: expected torch.float32"),
        (take_rows, (ZEROS, ZEROS, torch.zeros(4) > 0), ValueError, r"taken: expected shape \(3,\)"),
        (take_rows, (ZEROS, ZEROS, ZEROS.bool()[:, 0]), ValueError, "taken: expected contiguous entries"),
    ],
)
def test_bad_input_is_refused(operation, arguments, error, match):
    with pytest.raises(error, match=match):
        operation(*(x.to(DEVICE) for x in arguments))
