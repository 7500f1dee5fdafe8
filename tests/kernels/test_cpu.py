"""What torch's operations on a CPU are made of: rounding, masks as bytes, blocks of rows, selection by bits."""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import DEVICE, DTYPES, copied, gram, normal, row_state, uniform

from sparsefw.kernels import cpu, plain
from sparsefw.kernels.cpu.selection import kth_by_bits
from sparsefw.kernels.definitions import PRECISIONS
from sparsefw.kernels.masks import masked

MASK = normal(7, 33, seed=1) > 0.3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_have_the_bits_of_naive(dtype, precision):
    X = normal(1000) * 10.0 ** (76 * uniform(1000) - 38)
    X[:5] = torch.tensor([0.0, 3.4e38, 1e-40, -3e-42, 2.0**-126])
    X = X.to(dtype)
    got, expected = (module.round_operand(X, precision) for module in (cpu, naive))
    # tf32x3 subtracts an infinity from itself.
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_of_rows_change_nothing(per_row, group, monkeypatch):
    k = 2 if group else torch.arange(37, device=DEVICE) % 25 if per_row else 9
    V, corner = (cpu.lmo(normal(37, 24, seed=seed), 9) for seed in (2, 3))
    W, G = normal(37, 24), gram(24)
    M = 0.5 * corner + 0.25
    fixed = cpu.lmo(normal(37, 24, seed=5), 0 if per_row else 1, group=group)
    matrices = M, (W * (1 - M)) @ G, (W * ~V) @ G, V, torch.empty_like(W)
    whole = row_state(W, G.diagonal().clone(), *matrices, k, group=group, fixed=fixed)
    blocks = copied(whole)
    cpu.row_step(whole, theta=0.4, next_theta=1.0)
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(plain, name, 100)
    assert len(plain.row_blocks(M)) > 1
    cpu.row_step(blocks, theta=0.4, next_theta=1.0)
    for name in ("eta", "error", "M", "R", "V", "E"):
        assert torch.equal(getattr(whole, name), getattr(blocks, name))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_masked_gives_the_very_entries_and_zeros(dtype):
    X = normal(7, 33, dtype=dtype)
    X[~MASK & (X > 1)] = torch.nan
    X[~MASK & (X < -1)] = -torch.inf
    for given, mask in ((X, MASK), (X.T.contiguous().T, MASK), (X, MASK.T.contiguous().T)):
        kept = masked(given, mask)
        assert kept.dtype == dtype
        assert torch.equal(kept, X.masked_fill(~MASK, 0))
        # No -0, which would get into the checkpoint.
        assert not kept[~MASK].signbit().any()


@pytest.mark.parametrize("k", [0, 1, 30, 59, 60, torch.tensor([[0], [17], [60]])])
def test_selection_by_bits_is_that_of_a_sort(k):
    """Numbers of both signs and all sizes, zeros of both signs, ties, and what is chosen or left out before."""
    special = torch.tensor([-0.0, 0.0, 2.0**-149, -(2.0**-149), 3e38, -3e38, 1.0, 1.0, torch.inf, -torch.inf])
    score = torch.cat([normal(3, 50).cpu(), special.expand(3, -1)], 1)
    score[1] = 0.0
    score[2, 5:] = -torch.inf
    at = torch.as_tensor(k).clamp(min=1).expand(3, 1) - 1
    assert torch.equal(kth_by_bits(score, k), score.sort(dim=1, descending=True).values.gather(1, at))
