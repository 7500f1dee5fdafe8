"""candidates against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SHAPES, assert_near, gram, in_float64, normal, uniform

from sparsefw.kernels import naive_fits
from sparsefw.kernels.candidates import candidates


def arguments(rows, d, *, margin=True, support=True):
    mask = uniform(rows, d, seed=4) < 0.4
    diagonal = gram(d).diagonal()
    return dict(
        Z=normal(rows, d) * mask, R=300 * normal(rows, d, seed=1), mask=mask, inverse=1 / diagonal,
        root=diagonal.sqrt(), margin=uniform(rows, seed=5) if margin else None,
        support=uniform(rows, d, seed=6) < 0.8 if support else None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_as_close_to_float64_as_naive(row_backend, margin, support, shape):
    given = arguments(*shape, margin=margin, support=support)
    before = {name: x if x is None else x.clone() for name, x in given.items()}
    got, plain = row_backend.candidates(**given), naive_fits.candidates(**given)
    for x, y, truth in zip(got, plain, naive_fits.candidates(**in_float64(given)), strict=True):
        assert x.dtype == torch.float32
        assert_near(x, y, truth)
    assert torch.equal(got[0][given["mask"]], given["Z"][given["mask"]])
    for name, x in before.items():
        assert x is None or torch.equal(given[name], x), name


def test_specification():
    """One kept weight, one removed weight, and one outside of the support."""
    Z, R = torch.tensor([[2.0, 0, 0]]).double(), torch.tensor([[5.0, 6, 7]]).double()
    mask, support = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    inverse, root = torch.tensor([1.0, 0.5, 1]).double(), torch.tensor([1.0, 2, 3]).double()
    T, score = naive_fits.candidates(Z, R, mask, inverse, root, margin=torch.tensor([0.5]), support=support)
    assert T.tolist() == [[2, 3, 0]]
    assert score.tolist() == [[3, 6, 0]]
    T, score = naive_fits.candidates(Z, R, mask, inverse, root)
    assert T.tolist() == [[2, 3, 7]]
    assert score.tolist() == [[2, 6, 21]]


def test_a_margin_of_zero_is_no_margin(row_backend):
    given = arguments(37, 131, margin=False)
    plain = row_backend.candidates(**given)
    zero = row_backend.candidates(**given | dict(margin=torch.zeros(37, device=DEVICE)))
    assert all(torch.equal(x, y) for x, y in zip(plain, zero, strict=True))


def test_a_row_that_overflows_spoils_no_other(row_backend):
    given = arguments(37, 131)
    expected = row_backend.candidates(**given)
    given["R"][5] = torch.nan
    others = torch.arange(37, device=DEVICE) != 5
    for x, y in zip(row_backend.candidates(**given), expected, strict=True):
        assert torch.equal(x[others], y[others])
        assert x[5].isnan().any()


def test_no_rows(row_backend):
    assert [x.shape for x in row_backend.candidates(**arguments(0, 7))] == [(0, 7)] * 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(Z=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "Z: expected torch.float32"),
        (dict(R=torch.zeros(4, 3)), ValueError, r"R: expected shape \(3, 4\)"),
        (dict(mask=torch.zeros(3, 4)), TypeError, "mask: expected torch.bool"),
        (dict(support=torch.zeros(4, 3).bool().T), ValueError, "support: expected contiguous rows"),
        (dict(inverse=torch.zeros(3)), ValueError, r"inverse: expected shape \(4,\)"),
        (dict(root=torch.zeros(8)[::2]), ValueError, "root: expected contiguous entries"),
        (dict(margin=torch.zeros(3).double()), TypeError, "margin: expected torch.float32"),
    ],
)
def test_bad_input_is_refused(change, error, match):
    given = arguments(3, 4) | {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(error, match=match):
        candidates(**given)
