"""Masks through their bytes, against what torch does with them entry by entry."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, normal

from sparsefw.kernels.topk_torch import as_float, at_least, infinite, kth_by_bits, masked

MASK = normal(7, 33, seed=1) > 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keep_gives_the_very_entries_and_zeros(dtype):
    X = normal(7, 33, dtype=dtype)
    X[~MASK & (X > 1)] = torch.nan
    X[~MASK & (X < -1)] = -torch.inf
    for given, mask in ((X, MASK), (X.T.contiguous().T, MASK), (X, MASK.T.contiguous().T)):
        kept = masked(given, mask)
        assert kept.dtype == dtype
        assert torch.equal(kept, X.masked_fill(~MASK, 0))
        # No -0, which would get into the checkpoint.
        assert not kept[~MASK].signbit().any()
    assert torch.equal(MASK, normal(7, 33, seed=1) > 0.3)


def test_masks_as_numbers():
    assert torch.equal(as_float(MASK), MASK.float())
    X = normal(7, 33)
    assert torch.equal(torch.maximum(X, infinite(MASK)), X.masked_fill(MASK, torch.inf))


@pytest.mark.parametrize("shape", [(7, 33), (7, 1), (1, 33)])
def test_at_least(shape):
    X, Y = normal(7, 33), normal(*shape, seed=2)
    X[:, :3] = Y[:, :1]
    out = torch.zeros(7, 66, dtype=torch.bool, device=DEVICE)[:, ::2]
    assert torch.equal(at_least(X, Y), X >= Y)
    at_least(X, Y, out=out)
    assert torch.equal(out, X >= Y)
    at_least(X, 0.5, out=out)
    assert torch.equal(out, X >= 0.5)


class TestByBits:
    @pytest.mark.parametrize("k", [0, 1, 2, 30, 59, 60])
    def test_as_sorted(self, k):
        """Numbers of both signs and all sizes, zeros of both signs, ties, and what is chosen or left out before."""
        special = torch.tensor([-0.0, 0.0, 2.0**-149, -(2.0**-149), 3e38, -3e38, 1.0, 1.0, torch.inf, -torch.inf])
        score = torch.cat([normal(3, 50).cpu(), special.expand(3, -1)], 1)
        score[1] = 0.0
        score[2, 5:] = -torch.inf
        expected = score.sort(dim=1, descending=True).values[:, max(k, 1) - 1 : max(k, 1)]
        assert torch.equal(kth_by_bits(score, k), expected)

    def test_a_budget_for_each_row(self):
        score, k = normal(4, 33).cpu(), torch.tensor([[0], [1], [17], [33]])
        expected = score.sort(dim=1, descending=True).values.gather(1, k.clamp(min=1) - 1)
        assert torch.equal(kth_by_bits(score, k), expected)
