"""Options of a problem: swaps after the solve, a target gap, a damped matrix."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.problems import LINE_SEARCH, exhaustive, make_problem, penalized_error

from sparsefw.kernels import cpu
from sparsefw.solver import frank_wolfe
from sparsefw.solver.objective import damped


class TestSwaps:
    @pytest.mark.parametrize("sparsity", ["0.6", "layer:0.6", "2:4", "3:5"])
    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_no_row_is_worse_for_them(self, sparsity, alpha):
        problem = make_problem(40, 20, sparsity, alpha)
        plain, swapped = (frank_wolfe.solve(problem, steps=5, swaps=swaps) for swaps in (0, 100))
        assert (swapped.error <= plain.error * (1 + 1e-5)).all()
        assert swapped.error.sum() < 0.99 * plain.error.sum()
        assert torch.equal(swapped.bound, plain.bound)
        assert (swapped.bound <= swapped.error * (1 + 1e-5)).all()
        units = (40, -1, problem.group or 20)
        assert torch.equal(swapped.mask.view(units).sum(2), plain.mask.view(units).sum(2))
        assert problem.fixed is None or swapped.mask[problem.fixed].all()
        truth = penalized_error(problem.W.double(), problem.G.double(), swapped.mask.double(), 0)
        torch.testing.assert_close(swapped.error.double(), truth, rtol=1e-5, atol=0)

    def test_they_end_where_no_swap_of_their_pairs_is_left(self):
        """On rows of 12 the mask is better than almost all of its neighbours one swap away."""
        problem = make_problem(30, 12, "0.5")
        solution = frank_wolfe.solve(problem, steps=3, swaps=100)
        better, neighbours = 0, 0
        for r in range(30):
            kept = solution.mask[r].nonzero().flatten().tolist()
            for i, p in itertools.product(kept, sorted(set(range(12)) - set(kept))):
                e = problem.W[r].double().masked_fill(solution.mask[r], 0)
                e[i], e[p] = problem.W[r, i], 0
                better += (e @ problem.G.double() @ e) < solution.error[r] * (1 - 1e-5)
                neighbours += 1
        assert better < 0.02 * neighbours


class TestTargetGap:
    """Masked weights W that approximate a target, T = W + target_gap."""

    def make(self, alpha=0.0, sparsity="0.5", rows=8):
        problem = make_problem(rows, 12, sparsity, alpha)
        target_gap = 0.3 * torch.randn(rows, 12, generator=torch.Generator().manual_seed(8))
        return replace(problem, target_gap=target_gap)

    def errors(self, problem, mask):
        E = (problem.W + problem.target_gap - problem.W * mask).double()
        return (E * (E @ problem.G.double())).sum(1)

    @pytest.mark.parametrize("swaps", [0, 50])
    @pytest.mark.parametrize("damp", [0.0, 0.2])
    def test_against_exhaustive_search(self, swaps, damp):
        problem = self.make()
        masks = [torch.zeros(12) for _ in range(924)]
        for mask, kept in zip(masks, itertools.combinations(range(12), 6), strict=True):
            mask[list(kept)] = 1
        optimum = torch.stack([self.errors(problem, mask) for mask in masks]).amin(0)
        solution = frank_wolfe.solve(replace(problem, damped=damped(problem.G, damp)), steps=60, swaps=swaps)
        torch.testing.assert_close(solution.error.double(), self.errors(problem, solution.mask), rtol=1e-4, atol=1e-3)
        warm = self.errors(problem, problem.warm)
        torch.testing.assert_close(solution.error_warm_start.double(), warm, rtol=1e-4, atol=1e-3)
        assert (solution.bound <= optimum + 1e-5 * warm).all()
        assert (solution.error - optimum).sum() < 0.3 * (warm - optimum).sum()

    @pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
    def test_swaps_help(self, sparsity):
        problem = self.make(sparsity=sparsity, rows=40)
        plain, swapped = (frank_wolfe.solve(problem, steps=5, swaps=swaps) for swaps in (0, 100))
        assert (swapped.error <= plain.error * (1 + 1e-5)).all()
        assert swapped.error.sum() < 0.99 * plain.error.sum()

    def test_the_bound_is_the_tangent_s_minimum(self):
        problem = self.make(alpha=0.5)
        *_, state = frank_wolfe.iterate(problem, steps=9, penalty=0.0, **LINE_SEARCH)
        W, M, G = problem.W.double(), state.M.double(), problem.G.double()
        E = W + problem.target_gap - W * M
        gradient = -2 * W * (E @ G)
        V = cpu.lmo(-gradient.float(), 6, fixed=problem.fixed, positive=True)
        expected = (E * (E @ G)).sum(1) - (gradient * (M - V.double())).sum(1)
        bound = frank_wolfe.lower_bound(problem, state).double()
        torch.testing.assert_close(bound, expected, rtol=1e-3, atol=1e-3 * state.error.max().item())

    def test_masks_repair_the_target_gap(self):
        problem = self.make(rows=40)
        for_itself = frank_wolfe.solve(replace(problem, target_gap=None), steps=40)
        repairing = frank_wolfe.solve(problem, steps=40)
        assert repairing.error.sum() < 0.9 * self.errors(problem, for_itself.mask).sum()


class TestDamping:
    """Masks are chosen on the damped matrix; errors and bounds are on the one without damping."""

    @pytest.mark.parametrize("swaps", [0, 50])
    @pytest.mark.parametrize("penalty", [0.0, 1.0])
    def test_masks_are_those_of_the_damped_matrix(self, penalty, swaps):
        problem = make_problem(30, 16, "0.5")
        H = damped(problem.G, 0.5)
        options = {"steps": 40, "penalty": penalty, "swaps": swaps, "fallback_to_warm_start": False}
        solution = frank_wolfe.solve(replace(problem, damped=H), **options)
        by_hand = frank_wolfe.solve(replace(problem, G=H), **options)
        assert (solution.mask == by_hand.mask).all(1).double().mean() >= 0.9
        undamped = frank_wolfe.solve(problem, **options)
        assert (solution.mask == undamped.mask).all(1).double().mean() < 0.9

    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_errors_and_bounds_are_those_of_the_measured_matrix(self, alpha):
        problem = make_problem(8, 12, "0.5", alpha)
        problem = replace(problem, damped=damped(problem.G, 0.2))
        solution = frank_wolfe.solve(problem, steps=60, penalty=0.0)
        truth = penalized_error(problem.W.double(), problem.G.double(), solution.mask.double(), 0)
        torch.testing.assert_close(solution.error.double(), truth, rtol=1e-5, atol=0)
        assert (solution.error <= solution.error_warm_start).all()
        if not alpha:
            optimum = exhaustive(problem)
            assert (solution.bound <= optimum * (1 + 1e-5)).all()
            # The iterate is an optimum for another matrix, which makes the bound much weaker here.
            assert solution.bound.sum() > 0.1 * optimum.sum()

    def test_the_bound_of_a_damped_iterate(self):
        """The bound is that of a state that was never damped."""
        problem = make_problem(9, 20, "0.5", 0.5)
        problem = replace(problem, damped=damped(problem.G, 0.3))
        *_, state = frank_wolfe.iterate(problem, steps=10, penalty=1.0, **LINE_SEARCH)
        bound = frank_wolfe.lower_bound(problem, state)
        E = problem.W * (1 - state.M)
        expected = frank_wolfe.lower_bound(replace(problem, damped=None), replace(state, R=E @ problem.G))
        torch.testing.assert_close(bound, expected, rtol=1e-3, atol=1e-4 * state.error.max().item())
