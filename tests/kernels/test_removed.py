"""removed and begin_fit against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, SHAPES, garbage, normal, uniform

from sparsefw.kernels import naive_fits
from sparsefw.kernels.removed import begin_fit, removed


def a_mask(rows, d):
    return uniform(rows, d, seed=4) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_removed_is_rounded_once(row_backend, dtype, gap, shape):
    W, mask = normal(*shape, dtype=dtype), a_mask(*shape)
    target_gap = 0.1 * normal(*shape, seed=5) if gap else None
    truth = naive_fits.removed(W.double(), mask, None if target_gap is None else target_gap.double())
    E = row_backend.removed(W, mask, target_gap)
    assert E.dtype == (torch.float32 if gap else dtype)
    assert torch.equal(E, truth.to(E.dtype))
    for out_dtype in (torch.float32, torch.bfloat16):
        out = garbage(*shape, dtype=out_dtype)
        assert row_backend.removed(W, mask, target_gap, out=out) is out
        assert torch.equal(out, truth.float().to(out_dtype))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("e_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fits_begin_at_the_kept_weights(row_backend, dtype, e_dtype, shape):
    W, start, mask = normal(*shape, dtype=dtype), normal(*shape, seed=1), a_mask(*shape)
    # Entries outside of the mask are not read.
    start[~mask] = torch.nan
    Z, E = row_backend.begin_fit(W, start, mask, dtype=e_dtype)
    assert (Z.dtype, E.dtype) == (torch.float32, e_dtype)
    assert torch.equal(Z, torch.where(mask, start, 0))
    assert torch.equal(E, (W.float() - Z).to(e_dtype))
    # The start may be the weight itself.
    Z, E = row_backend.begin_fit(W, W, mask, dtype=e_dtype)
    assert torch.equal(Z, W.float() * mask)
    assert torch.equal(E.float(), (W.float() * ~mask).to(e_dtype).float())


def test_specification_of_a_fits_start():
    W, start, mask = normal(3, 5).double(), normal(3, 5, seed=1).double(), a_mask(3, 5)
    Z, E = naive_fits.begin_fit(W, start, mask)
    assert torch.equal(Z, start * mask)
    assert torch.equal(E, W - start * mask)
    assert torch.equal(naive_fits.removed(W, mask, start), start + W * ~mask)


def test_rows_of_wider_matrices(row_backend):
    wide, mask = normal(37, 200), a_mask(37, 200)
    W, kept, out = wide[:, 9:140], mask[:, 9:140], garbage(37, 200)[:, 9:140]
    row_backend.removed(W, kept, wide[:, 20:151], out=out)
    assert torch.equal(out, wide[:, 20:151] + W * ~kept)
    Z, E = row_backend.begin_fit(W, wide[:, 20:151], kept)
    assert torch.equal(Z, wide[:, 20:151] * kept)
    assert torch.equal(E, W - Z)


def test_no_rows(row_backend):
    W, mask = torch.empty(0, 7, device=DEVICE), torch.empty(0, 7, dtype=torch.bool, device=DEVICE)
    assert row_backend.removed(W, mask).shape == (0, 7)
    assert [x.shape for x in row_backend.begin_fit(W, W, mask)] == [(0, 7)] * 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(W=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "W: expected torch.float32"),
        (dict(mask=torch.zeros(3, 4)), TypeError, "mask: expected torch.bool"),
        (dict(target_gap=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "target_gap: expected torch.float32"),
        (dict(target_gap=torch.zeros(4, 3).T), ValueError, "target_gap: expected contiguous rows"),
        (dict(out=torch.zeros(4, 4)), ValueError, r"out: expected shape \(3, 4\)"),
    ],
)
def test_removed_refuses_bad_input(change, error, match):
    given = dict(W=torch.zeros(3, 4), mask=torch.zeros(3, 4).bool(), target_gap=None, out=None) | change
    with pytest.raises(error, match=match):
        removed(**{name: x if x is None else x.to(DEVICE) for name, x in given.items()})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(start=torch.zeros(4, 3)), ValueError, r"start: expected shape \(3, 4\)"),
        (dict(mask=torch.zeros(3, 4)), TypeError, "mask: expected torch.bool"),
    ],
)
def test_begin_fit_refuses_bad_input(change, error, match):
    zeros = torch.zeros(3, 4)
    given = dict(W=zeros, start=zeros, mask=zeros.bool()) | change
    with pytest.raises(error, match=match):
        begin_fit(**{name: x.to(DEVICE) for name, x in given.items()})
