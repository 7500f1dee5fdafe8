"""Targets: the weights that repair the loss of earlier layers."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, gram, normal, uniform

from sparsefw.solver.objective import damped
from sparsefw.solver.target import find_target

ROWS, D = 13, 40


class TestTarget:
    def objective(self, W, T, G, B):
        """||D - (T - W) X||^2 up to a constant."""
        E = T.double() - W.double()
        return (E * (E @ G.double()) - 2 * E * B.double()).sum(1)

    def test_many_steps_solve_the_normal_equations(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        H = damped(G, 0.1)
        T = find_target(W, H, B.clone(), 60)
        best = W.double() + torch.linalg.solve(H.double(), B.double().T).T
        torch.testing.assert_close(T.double(), best, rtol=0, atol=1e-5 * best.abs().max().item())
        assert (best - W).abs().max() > 0.1

    def test_no_step_goes_away_from_it(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        last = torch.zeros(ROWS, dtype=torch.float64, device=DEVICE)
        for steps in range(1, 12):
            now = self.objective(W, find_target(W, G, B.clone(), steps), G, B)
            assert (now <= last + 1e-6 * last.abs()).all()
            last = now
        assert (last < 0).all()

    def test_nothing_lost_leaves_the_weights(self):
        W = normal(ROWS, D)
        T = find_target(W, gram(D), torch.zeros(ROWS, D, device=DEVICE), 4)
        assert torch.equal(T, W)
        assert T is not W

    def test_weights_of_dead_inputs_stay(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        G[3], G[:, 3], B[:, 3] = 0, 0, 0
        T = find_target(W, G, B, 8)
        assert torch.equal(T[:, 3], W[:, 3])
        assert T.isfinite().all()
        assert (T[:, 4] != W[:, 4]).any()

    def test_in_fp32_whatever_the_weight(self):
        """The gap to the target is less than its own rounding to bf16."""
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        half = find_target(W.bfloat16(), G, B.clone(), 4)
        assert torch.equal(half, find_target(W.bfloat16().float(), G, B, 4))


class TestSupport:
    """Weights that may change."""

    def test_many_steps_solve_the_normal_equations_of_the_support(self):
        W, H, B = normal(ROWS, D), damped(gram(D), 0.1), normal(ROWS, D, seed=1) * 50
        support = uniform(ROWS, D) < 0.6
        T = find_target(W, H, B.clone(), 80, support=support)
        assert torch.equal(T[~support], W[~support])
        for w, b, t, free in zip(W.double(), B.double(), T.double(), support, strict=True):
            best = w[free] + torch.linalg.solve(H.double()[free][:, free], b[free])
            torch.testing.assert_close(t[free], best, rtol=0, atol=1e-5 * best.abs().max().item())

    @pytest.mark.parametrize("steps", [1, 4])
    def test_nothing_else_moves_at_any_step(self, steps):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        support = uniform(ROWS, D) < 0.6
        support[3] = False
        T = find_target(W, G, B, steps, support=support)
        assert torch.equal(T == W, ~support)

    def test_all_weights_are_as_none_given(self):
        W, G, B = normal(ROWS, D), gram(D), normal(ROWS, D, seed=1) * 50
        support = torch.ones(ROWS, D, dtype=torch.bool, device=DEVICE)
        assert torch.equal(find_target(W, G, B.clone(), 4, support=support), find_target(W, G, B, 4))
