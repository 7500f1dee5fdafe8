"""Masks and weights together, against exhaustive search and against a refit alone; masked weights with a target gap."""

import dataclasses
import itertools

import pytest
import torch
from helpers.kernel_inputs import DEVICE, generator, gram, normal, uniform
from helpers.problems import TRITON
from helpers.refits import damp_by, error, exact

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import frank_wolfe, patterns, reselect
from sparsefw.solver.refit import inverse_diagonal, refit
from sparsefw.solver.saliency import wanda

PATTERNS = ("0.6", "layer:0.6", "2:4", "3:8")


def mixed_gram(d, seed):
    """A Gram matrix of inputs that mix the same few sources, so that kept weights can make up for much."""
    X = torch.randn(4 * d, d // 2, generator=generator(seed)) @ torch.randn(d // 2, d, generator=generator(seed + 1))
    X += torch.randn(4 * d, d, generator=generator(seed + 2))
    return damp_by(X.T @ X).to(DEVICE)


def make_problem(rows=48, d=40, sparsity="0.6", seed=0, k=None, backend=TORCH):
    W, G = normal(rows, d, seed=seed), mixed_gram(d, seed + 10)
    saliency = wanda(W, G.diagonal())
    pattern = patterns.parse(sparsity)
    k = patterns.kept(pattern, saliency) if k is None else k
    return frank_wolfe.make_problem(W, G, saliency, k, group=pattern.group, backend=backend)


def solve(problem, *, steps=24, rounds=3, refit_steps=6, support=None, backend=TORCH):
    """Frank-Wolfe, then re-selection from its mask."""
    mask = frank_wolfe.solve(problem, steps=steps, backend=backend).mask
    options = {"steps": steps, "penalty": 1.0, "refit_steps": refit_steps, "rounds": rounds, "support": support}
    return reselect.reselect(problem, mask, **options, backend=backend)


def assert_kept(problem, mask):
    kept = mask.view(len(mask), -1, problem.group or mask.shape[1]).sum(2)
    k = problem.k[:, None] if isinstance(problem.k, torch.Tensor) else problem.k
    assert (kept == k).all()


class TestReselect:
    @pytest.mark.parametrize("sparsity", PATTERNS)
    def test_budget_error_and_never_worse_than_a_refit(self, sparsity):
        problem = make_problem(sparsity=sparsity)
        if sparsity == "layer:0.6":
            assert problem.k.unique().numel() > 3
        before = [X.clone() for X in (problem.W, problem.G, problem.saliency)]
        alone, fit = solve(problem, rounds=0), solve(problem)
        assert_kept(problem, fit.mask)
        assert (fit.Z[~fit.mask] == 0).all()
        truth, refitted = error(problem.W, fit.Z, problem.G), error(problem.W, alone.Z, problem.G)
        torch.testing.assert_close(fit.error.double(), truth, rtol=1e-4, atol=0)
        assert (truth <= refitted * (1 + 1e-5)).all()
        assert truth.sum() < 0.97 * refitted.sum()
        for X, Y in zip((problem.W, problem.G, problem.saliency), before, strict=True):
            assert torch.equal(X, Y)

    def test_no_rounds_keep_the_mask(self):
        problem = make_problem()
        mask = frank_wolfe.solve(problem, steps=24).mask
        fit = solve(problem, rounds=0)
        assert torch.equal(fit.mask, mask)
        assert torch.equal(fit.Z, refit(problem.W, problem.G, mask, problem.W, 6).Z)

    def test_every_round_helps_and_none_harms(self):
        problem = make_problem()
        fits = [solve(problem, rounds=rounds).error for rounds in (0, 1, 2)]
        for fewer, more in itertools.pairwise(fits):
            assert (more <= fewer).all()
            assert more.sum() < fewer.sum()

    def test_margin_per_row(self, monkeypatch):
        """A row has a wider margin after a rejected round, and a narrower one after an accepted round."""
        problem = make_problem(rows=3)
        scores, verdicts = [], iter([[1, 0, 0], [1, 0, 1], [0, 1, 1]])
        lmo, taken = cpu.lmo, reselect.Fit.take_better

        def spy(score, k, **options):
            if not options.get("positive"):
                scores.append(score.clone())
            return lmo(score, k, **options)

        # The restart is judged apart from the rounds.
        def verdict(self, other, backend, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) == 1:
                return taken(self, other, backend)
            return torch.tensor(next(verdicts), device=DEVICE).bool()

        mask = frank_wolfe.solve(problem, steps=6).mask
        monkeypatch.setattr(reselect.Fit, "take_better", verdict)
        monkeypatch.setattr(cpu, "lmo", spy)
        fit = reselect.reselect(problem, mask, steps=6, penalty=1.0, refit_steps=2, rounds=3)
        # No fit is taken, so that scores differ by the margins only.
        plain = scores[-3]
        for score, margins in zip(scores[-2:], [[0, 0.1, 0.1], [0, 0.3, 0.07]], strict=True):
            expected = plain * (1 + torch.tensor(margins, device=DEVICE)[:, None] * fit.mask)
            torch.testing.assert_close(score, expected)

    @pytest.mark.parametrize("sparsity", PATTERNS)
    def test_every_mask_tried_is_within_the_budget(self, sparsity, monkeypatch):
        problem, tried = make_problem(sparsity=sparsity), []
        monkeypatch.setattr(
            reselect, "refit", lambda W, G, mask, *a, **o: tried.append(mask) or refit(W, G, mask, *a, **o)
        )
        solve(problem)
        assert len(tried) == 5
        for mask in tried:
            assert_kept(problem, mask)

    def test_restart_solves_for_the_candidates(self, monkeypatch):
        """The restart's problem is min ||(W - M * T) X||^2, by its first residual and the weights that it may keep."""
        problem, starts, iterate = make_problem(), [], frank_wolfe.iterate
        monkeypatch.setattr(frank_wolfe, "iterate", lambda p, *R, **o: starts.append((p, o)) or iterate(p, *R, **o))
        solve(problem, steps=24, rounds=1)
        (_, first), (again, second) = starts
        assert (first["steps"], second["steps"]) == (24, 8)
        *_, state = iterate(again, **second)
        R = (problem.W.double() - state.M.double() * again.W.double()) @ problem.G.double()
        torch.testing.assert_close(state.R.double(), R, rtol=0, atol=1e-5 * R.abs().max().item())
        assert not torch.equal(again.W, problem.W)

    @pytest.mark.parametrize("steps", [0, 1, 2])
    def test_few_steps(self, steps):
        """A third of so few steps is no step."""
        problem = make_problem()
        fit = solve(problem, steps=steps)
        assert_kept(problem, fit.mask)
        assert fit.error.sum() < solve(problem, steps=steps, rounds=0).error.sum()

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
    def test_a_row_that_overflows_spoils_no_other(self, backend):
        problem = make_problem(rows=8)
        options = {"steps": 6, "penalty": 1.0, "refit_steps": 2, "rounds": 2, "backend": backend}
        expected = reselect.reselect(problem, problem.warm, **options)
        problem.W[3, ~problem.warm[3]] = 1e30
        fit = reselect.reselect(problem, problem.warm, **options)
        assert fit.error.isfinite().tolist() == [n != 3 for n in range(8)]
        others = torch.arange(8, device=DEVICE) != 3
        assert torch.equal(fit.error[others], expected.error[others])
        assert torch.equal(fit.mask[others], expected.mask[others])

    def test_rerun_is_bit_identical(self):
        problem = make_problem()
        first, second = solve(problem), solve(problem)
        assert torch.equal(first.mask, second.mask)
        assert torch.equal(first.Z, second.Z)
        assert torch.equal(first.error, second.error)

    @pytest.mark.parametrize("k", [0, 40])
    def test_nothing_and_everything(self, k):
        problem = make_problem(rows=5, k=k)
        fit = solve(problem)
        assert torch.equal(fit.Z, problem.W if k else torch.zeros_like(problem.W))

    def test_dead_inputs_and_empty_rows(self):
        problem = make_problem(rows=6)
        problem.G[[3, 8]], problem.G[:, [3, 8]] = 0, 0
        problem.W[2] = 0
        fit = solve(problem)
        assert_kept(problem, fit.mask)
        assert fit.Z.isfinite().all()
        assert (fit.Z[2] == 0).all()
        assert fit.error[2] == 0

    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    def test_low_precision_is_nearly_as_good(self, precision):
        problem = make_problem()
        truth, alone, low = (
            error(problem.W, fit.Z, problem.G).sum()
            for fit in (solve(problem), solve(problem, rounds=0), solve(problem, backend=Backend(cpu, precision)))
        )
        assert low - truth < 0.25 * (alone - truth)
        assert low != truth

    @pytest.mark.slow
    def test_kernels_agree(self):
        problem = make_problem(rows=11, backend=TRITON)
        on_torch, on_triton = solve(problem, steps=6, rounds=1), solve(problem, steps=6, rounds=1, backend=TRITON)
        assert_kept(problem, on_triton.mask)
        # A nearly tied entry may go either way.
        torch.testing.assert_close(on_torch.error.sum(), on_triton.error.sum(), rtol=5e-3, atol=0)
        assert (on_torch.mask != on_triton.mask).sum() <= 6


class TestSupport:
    """Weights that may be nonzero."""

    def make(self, sparsity="0.6"):
        problem = make_problem(sparsity=sparsity)
        support = uniform(*problem.W.shape, seed=4) < 0.7
        return dataclasses.replace(problem, W=problem.W.masked_fill(~support, 0)), support

    @pytest.mark.parametrize("sparsity", PATTERNS)
    @pytest.mark.parametrize("rounds", [0, 3])
    def test_every_mask_tried_is_within_it(self, rounds, sparsity, monkeypatch):
        (problem, support), tried = self.make(sparsity), []
        monkeypatch.setattr(
            reselect, "refit", lambda W, G, mask, *a, **o: tried.append(mask) or refit(W, G, mask, *a, **o)
        )
        fit = solve(problem, rounds=rounds, support=support)
        assert len(tried) == (5 if rounds else 1)
        assert not any((mask & ~support).any() for mask in tried)
        assert (fit.Z[~support] == 0).all()
        torch.testing.assert_close(fit.error.double(), error(problem.W, fit.Z, problem.G), rtol=1e-4, atol=0)

    def test_no_candidate_is_outside_of_it(self):
        problem, support = self.make()
        mask = frank_wolfe.solve(problem, steps=6).mask
        fit = refit(problem.W, problem.G, mask & support, problem.W, 3)
        diagonal = inverse_diagonal(problem.G), problem.G.diagonal().sqrt()
        T, free = (TORCH.candidates(fit.Z, fit.R, fit.mask, *diagonal, support=within)[0] for within in (support, None))
        assert (T[~support] == 0).all()
        assert torch.equal(T[support], free[support])
        assert (free[~support] != 0).any()

    def test_rounds_help(self):
        problem, support = self.make()
        fewer, more = (solve(problem, rounds=rounds, support=support).error for rounds in (0, 3))
        assert (more <= fewer).all()
        assert more.sum() < 0.99 * fewer.sum()

    def test_all_weights_are_as_none_given(self):
        problem = make_problem()
        plain, all_of_them = (
            solve(problem, support=support) for support in (None, torch.ones_like(problem.W, dtype=torch.bool))
        )
        assert torch.equal(plain.mask, all_of_them.mask)
        assert torch.equal(plain.Z, all_of_them.Z)


class TestExhaustive:
    def test_rows_of_eight(self):
        """Against every mask with its exact weights, most rows find the best mask, and no row is far from it."""
        problem = make_problem(rows=40, d=8, k=3)
        fit = solve(problem, rounds=6, refit_steps=12)
        W, G = problem.W, problem.G
        masks = torch.zeros(56, 8, dtype=torch.bool, device=DEVICE)
        for mask, kept in zip(masks, itertools.combinations(range(8), 3), strict=True):
            mask[list(kept)] = True
        errors = torch.stack([error(W, exact(W, G, mask.expand(W.shape)), G) for mask in masks])
        ratio = error(W, fit.Z, G) / errors.amin(0)
        assert (ratio >= 1 - 1e-5).all()
        alone = error(W, solve(problem, rounds=0, refit_steps=12).Z, G) / errors.amin(0)
        assert ratio.mean() - 1 < 0.5 * (alone.mean() - 1)
        assert (ratio < 1 + 1e-4).double().mean() >= 0.75
        assert ratio.max() < 1.6
        assert ratio.mean() < 1.05


class TestCandidates:
    def test_removed_weights_stand_where_one_step_of_their_own_takes_them(self):
        problem = make_problem(rows=6)
        W, G = problem.W, problem.G
        mask = uniform(6, 40) < 0.4
        fit = refit(W, G, mask, W, 3)
        T, _ = TORCH.candidates(fit.Z, fit.R, fit.mask, inverse_diagonal(G), G.diagonal().sqrt())
        assert torch.equal(T[mask], fit.Z[mask])
        Z = fit.Z.double()
        for j in range(40):

            def alone(factor, j=j):
                moved = Z.clone()
                moved[:, j] = T[:, j].double() * factor
                return error(W, moved, G)

            removed = ~mask[:, j]
            for factor in (0.9, 1.1):
                assert (alone(1.0) < alone(factor))[removed].all()

    def test_score_is_the_root_of_the_error_of_one_removal(self):
        T, G, mask = normal(5, 12), gram(12), uniform(5, 12) < 0.4
        fit = refit(T, G, mask, T, 3)
        T, score = TORCH.candidates(fit.Z, fit.R, mask, inverse_diagonal(G), G.diagonal().sqrt())
        for j in range(12):
            removed = T.clone()
            removed[:, j] = 0
            torch.testing.assert_close(score[:, j].double() ** 2, error(T, removed, G), rtol=1e-5, atol=0)


class TestTargetGap:
    """(W - M * T) G is carried along for masked weights T that approximate W."""

    def state(self, sparsity="0.6", penalty=0.0, steps=12, backend=TORCH):
        problem = make_problem(rows=7, sparsity=sparsity)
        W, G = problem.W, problem.G
        T = W + 0.3 * normal(*W.shape, seed=5)
        target_gap = W - T
        kept = target_gap.clone()
        again = frank_wolfe.Problem(T, G, T.abs(), problem.k, problem.warm, None, problem.group, target_gap=target_gap)
        options = {"step_rule": "line-search", "penalty": penalty, "backend": backend}
        for state in frank_wolfe.iterate(again, steps=steps, **options):
            yield W, T, G, state
        assert torch.equal(target_gap, kept)

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
    @pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
    def test_residual_is_that_of_the_weights_approximated(self, sparsity, backend):
        for W, T, G, state in self.state(sparsity, penalty=1.0, backend=backend):
            R = (W.double() - state.M.double() * T.double()) @ G.double()
            torch.testing.assert_close(state.R.double(), R, rtol=0, atol=1e-5 * R.abs().max().item())

    def test_line_search_finds_the_minimum_on_the_way_to_every_vertex(self):
        steps, last = torch.linspace(-0.05, 0.05, 11, device=DEVICE)[:, None, None], None
        for W, T, G, state in self.state():
            now = error(W, state.M * T, G)
            if last is not None:
                M, before = last
                assert (now <= before * (1 + 1e-6)).all()
                # The step went from M to state.M; a slightly shorter or longer one is no better.
                way = state.M - M
                for step in steps:
                    moved = M + (1 + step) * way
                    free = (moved.amin(1) >= 0) & (moved.amax(1) <= 1)
                    assert (now <= error(W, moved * T, G) * (1 + 1e-6))[free].all()
            last = state.M.clone(), now

    def test_vertex_is_that_of_the_gradient(self):
        for W, T, G, state in self.state():
            gradient = -2 * T.double() * ((W.double() - state.M.double() * T.double()) @ G.double())
            assert (cpu.lmo(-gradient.float(), 16, positive=True) == state.V).double().mean() > 0.99

    def test_a_target_gap_of_zero_changes_nothing(self):
        problem = make_problem(rows=5)
        options = {"step_rule": "line-search", "penalty": 1.0, "backend": TORCH, "steps": 9}
        zero = dataclasses.replace(problem, target_gap=torch.zeros_like(problem.W))
        for plain, with_gap in zip(
            frank_wolfe.iterate(problem, **options), frank_wolfe.iterate(zero, **options), strict=True
        ):
            assert torch.equal(plain.M, with_gap.M)
            assert torch.equal(plain.R, with_gap.R)
