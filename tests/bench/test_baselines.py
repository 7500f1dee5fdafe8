"""The benchmark's baselines: ADMM against its fixed point, 1-swaps against all swaps."""

from itertools import count

import baselines
import pytest
import torch
from helpers.kernel_inputs import DEVICE, gram, normal
from helpers.problems import error

from sparsefw.kernels import cpu
from sparsefw.solver.frank_wolfe import mask_error

# k and group: per row, and n:m.
BUDGETS = [(10, 0), (2, 4), (1, 3), (5, 8)]


def wanda_mask(W, G, k, group=0):
    return cpu.lmo(W.abs() * G.diagonal().sqrt(), k, group=group)


class TestAdmm:
    @pytest.mark.parametrize(("k", "group"), BUDGETS)
    def test_update_pays(self, k, group):
        """The error is lower than that of its own mask without the update, and than that of Wanda's mask."""
        W, G = normal(30, 24), gram(24)
        mask, Z = baselines.admm(W, G, k, group=group)
        assert (mask.view(30, -1, group or 24).sum(2) == k).all()
        assert (Z[~mask] == 0).all()
        assert (error(W, Z, G) < error(W, W * mask, G)).all()
        assert error(W, Z, G).sum() < 0.8 * error(W, W * wanda_mask(W, G, k, group), G).sum()

    @pytest.mark.parametrize(("k", "group"), [(10, 0), (2, 4)])
    def test_fixed_point_is_the_damped_least_squares(self, k, group):
        """Once the mask stays, the weights go to the minimum of ||(W - Z) X||^2 + damp ||(W - Z) n||^2 on it."""
        W, G = normal(5, 24), gram(24)
        scale = torch.logspace(-1, 1, 24, device=DEVICE)
        G = G * (scale * scale[:, None])
        mask, Z = baselines.admm(W, G, k, group=group, steps=300)
        H = G.double() + 0.1 * G.double().diagonal().diag()
        for w, z, kept in zip(W.double(), Z.double(), mask, strict=True):
            best = torch.linalg.solve(H[kept][:, kept], H[kept] @ w)
            torch.testing.assert_close(z[kept], best, rtol=1e-4, atol=1e-4)


def swap_changes(w, G, mask, group):
    """The error change of every allowed swap of one row, from the errors of the masks themselves, float64."""
    width, before = group or len(w), error(w[None], (w * mask)[None], G)
    changes = []
    for i in mask.nonzero().flatten().tolist():
        for p in (~mask).nonzero().flatten().tolist():
            if i // width == p // width:
                swapped = mask.clone()
                swapped[i], swapped[p] = False, True
                changes.append(float(error(w[None], (w * swapped)[None], G) - before))
    return changes


@pytest.mark.parametrize(("k", "group"), BUDGETS)
def test_every_swap_is_the_best_one_and_none_is_left(k, group):
    W, G = normal(8, 24, seed=3), gram(24, seed=5)
    start = mask = wanda_mask(W, G, k, group)
    first = error(W, W * start, G)
    for limit in count(1):
        after = baselines.one_swaps(W, G, start, group=group, limit=limit)
        assert (after.view(8, -1, group or 24).sum(2) == k).all()
        changes = error(W, W * after, G) - error(W, W * mask, G)
        for w, row, change, scale in zip(W, mask, changes.tolist(), first.tolist(), strict=True):
            assert change == pytest.approx(min(0, *swap_changes(w, G, row, group)), abs=1e-5 * scale)
        if torch.equal(after, mask):
            break
        mask = after
    assert limit > 2
    assert torch.equal(baselines.one_swaps(W, G, start, group=group), mask)
    assert mask_error(W, mask, G).sum() < 0.9 * mask_error(W, start, G).sum()
