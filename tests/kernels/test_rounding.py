"""round_mask against the specification, which is exact, and against a sort by two keys."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SHAPES, normal, uniform

from sparsefw.kernels import naive_fits
from sparsefw.kernels.rounding import round_mask


def relaxed(rows, d, seed=0):
    """Masks as a solve leaves them: some binary, some with ties at a fraction, some of all values."""
    M = uniform(rows, d, seed=seed)
    kind = torch.arange(rows, device=DEVICE)[:, None] % 4
    M = torch.where(kind == 0, (M < 0.4).float(), M)
    M = torch.where(kind == 1, (4 * M).round() / 4, M)
    return torch.where(kind == 2, torch.full_like(M, 0.25), M).contiguous()


def saliencies(rows, d):
    # Few values, so that they tie, too.
    return (3 * uniform(rows, d, seed=1)).round()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5000)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows(row_backend, share, shape):
    M, saliency, k = relaxed(*shape), saliencies(*shape), int(share * shape[1])
    expected = naive_fits.round_mask(M, saliency, k)
    assert (expected.sum(1) == k).all()
    assert torch.equal(row_backend.round_mask(M, saliency, k), expected)


def test_rows_of_their_own_budgets(row_backend):
    M, saliency = relaxed(37, 131), saliencies(37, 131)
    k = (131 * uniform(37, seed=2)).long()
    k[:3] = torch.tensor([0, 131, 1])
    expected = naive_fits.round_mask(M, saliency, k)
    assert torch.equal(expected.sum(1), k)
    assert torch.equal(row_backend.round_mask(M, saliency, k), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (16, 32), (1, 1)])
def test_groups(row_backend, n, m):
    M, saliency = relaxed(37, 5 * m), saliencies(37, 5 * m)
    expected = naive_fits.round_mask(M, saliency, n, group=m)
    assert (expected.view(37, 5, m).sum(2) == n).all()
    assert torch.equal(row_backend.round_mask(M, saliency, n, group=m), expected)


def test_specification_is_a_sort_by_two_keys():
    M, saliency = relaxed(40, 23), saliencies(40, 23)
    mask = naive_fits.round_mask(M, saliency, 9)
    for m, s, kept in zip(M.tolist(), saliency.tolist(), mask.tolist(), strict=True):
        best = sorted(range(23), key=lambda j, m=m, s=s: (-m[j], -s[j], j))[:9]
        assert sorted(best) == [j for j in range(23) if kept[j]]


def test_a_binary_mask_stays(row_backend):
    mask = torch.stack([torch.randperm(131, generator=torch.Generator().manual_seed(n)) < 50 for n in range(37)])
    mask = mask.to(DEVICE)
    assert torch.equal(row_backend.round_mask(mask.float(), normal(37, 131).abs(), 50), mask)


def test_inputs_stay(row_backend):
    M, saliency = relaxed(37, 131), saliencies(37, 131)
    before = M.clone(), saliency.clone()
    row_backend.round_mask(M, saliency, 50)
    assert torch.equal(M, before[0])
    assert torch.equal(saliency, before[1])


def test_no_rows(row_backend):
    M = torch.empty(0, 8, device=DEVICE)
    assert row_backend.round_mask(M, M, 3).shape == (0, 8)
    assert row_backend.round_mask(M, M, 2, group=4).shape == (0, 8)


def test_bad_input_is_refused(row_backend):
    M = relaxed(3, 8)
    for options, match in ((dict(k=9), "k: expected 0 to 8"), (dict(k=2, group=3), "group: expected a divisor")):
        with pytest.raises(ValueError, match=match):
            row_backend.round_mask(M, M, **options)
    for saliency, error in ((M.bfloat16(), TypeError), (M[:, :4], ValueError), (torch.empty(8, 3).T, ValueError)):
        with pytest.raises(error, match="saliency: expected"):
            round_mask(M, saliency.to(DEVICE), 3)
