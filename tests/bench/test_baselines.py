"""The benchmark's baselines: ADMM against its fixed point, 1-swaps against all swaps."""

import baselines
import pytest
import torch
from helpers.kernel_inputs import DEVICE, gram, normal

from sparsefw.kernels import cpu
from sparsefw.solver.objective import mask_error

# k and group: per row, and n:m.
BUDGETS = [(10, 0), (2, 4), (1, 3), (5, 8)]


def wanda_mask(W, G, k, group=0):
    return cpu.lmo(W.abs() * G.diagonal().sqrt(), k, group=group)


def error(W, Z, G):
    """||(W - Z) X||^2 of every row, in float64."""
    E = W.double() - Z.double()
    return (E * (E @ G.double())).sum(1)


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
    width = group or len(w)
    changes = {}
    for i in mask.nonzero().flatten().tolist():
        for p in (~mask).nonzero().flatten().tolist():
            if i // width == p // width:
                swapped = mask.clone()
                swapped[i], swapped[p] = False, True
                changes[i, p] = float(error(w[None], (w * swapped)[None], G) - error(w[None], (w * mask)[None], G))
    return changes


class TestOneSwaps:
    @pytest.mark.parametrize(("k", "group"), BUDGETS)
    def test_every_swap_is_the_best_one_and_none_is_left(self, k, group, monkeypatch):
        """Every swap of each row's search, and its change of the error, is compared with all swaps."""
        W, G = normal(8, 24, seed=3), gram(24, seed=5)
        name = "_best_in_groups" if group else "_best_in_row"
        choices, choose = [], getattr(baselines, name)

        def spy(a, b, pairs, *gain):
            # The bound that excludes pairs is at least the gain of any of them, whatever was swapped before.
            assert all((bound >= pairs.masked_fill(b.isinf(), -torch.inf).amax(1)).all() for bound in gain)
            choices.append(choose(a, b, pairs, *gain))
            return choices[-1]

        monkeypatch.setattr(baselines, name, spy)
        mask = wanda_mask(W, G, k, group)
        swapped = baselines.one_swaps(W, G, mask, group=group)
        swaps = 0
        for w, row, end in zip(W, mask.clone(), swapped, strict=True):
            tiny = 1e-5 * float(error(w[None], (w * row)[None], G))
            while True:
                changes = swap_changes(w, G, row, group)
                i, p, change = choices.pop(0)
                assert change == pytest.approx(changes[i, p], abs=tiny)
                assert changes[i, p] <= min(changes.values()) + tiny
                if torch.equal(row, end):
                    assert min(changes.values()) >= -tiny
                    break
                assert changes[i, p] < 0
                row[i], row[p] = False, True
                swaps += 1
        assert not choices
        assert swaps >= 8

    def test_excluded_pairs_hold_no_better_one(self):
        """In wide rows with outliers most pairs are never looked at, and yet every swap is the best of all pairs."""
        W, G = normal(6, 150, seed=1), gram(150, tokens=200, seed=2)
        scale = normal(150, seed=4).exp()
        G = G * (scale * scale[:, None])
        mask = wanda_mask(W, G, 60)
        w, gram64 = W.double(), G.double()
        pairs = 2 * w[:, :, None] * w[:, None, :] * gram64
        swapped = 0
        for limit in range(15):
            after = baselines.one_swaps(W, G, mask, limit=1)
            lin, q = 2 * w * ((w * ~mask) @ gram64), w**2 * gram64.diagonal()
            a, b = (q + lin).masked_fill(~mask, torch.inf), (q - lin).masked_fill(mask, torch.inf)
            best = (a[:, :, None] + b[:, None, :] - pairs).flatten(1).amin(1)
            change = error(W, W * after, G) - error(W, W * mask, G)
            torch.testing.assert_close(change, best.clamp(max=0), rtol=1e-9, atol=1e-9)
            mask = baselines.one_swaps(W, G, wanda_mask(W, G, 60), limit=limit + 1)
            assert torch.equal(mask, after)
            swapped += int((best < 0).sum())
        assert swapped > 30

    @pytest.mark.parametrize(("k", "group"), BUDGETS)
    def test_budget_stays_and_error_falls(self, k, group):
        W, G = normal(40, 24), gram(24)
        mask = wanda_mask(W, G, k, group)
        before = W.clone(), G.clone(), mask.clone()
        swapped = baselines.one_swaps(W, G, mask, group=group)
        assert (swapped.view(40, -1, group or 24).sum(2) == k).all()
        old, new = mask_error(W, mask, G), mask_error(W, swapped, G)
        assert (new <= old).all()
        assert new.sum() < 0.9 * old.sum()
        assert torch.equal(baselines.one_swaps(W, G, swapped, group=group), swapped)
        for now, then in zip((W, G, mask), before, strict=True):
            assert torch.equal(now, then)
