"""Refits against float64 least squares; masks and weights together against exhaustive search and a refit alone."""

import itertools

import pytest
import torch
from helpers.kernel_inputs import DEVICE, generator, gram, normal, uniform
from helpers.problems import TRITON, assert_budget, error, problem_of, warm_of
from helpers.tensors import assert_equal

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import frank_wolfe, patterns, stack
from sparsefw.solver import refit as module
from sparsefw.solver.frank_wolfe import penalty_schedule
from sparsefw.solver.methods import wanda
from sparsefw.solver.refit import RowFit, inverse_diagonal, refit, reselect

ROWS, D = 9, 24
PATTERNS = ("0.6", "layer:0.6", "2:4", "3:8")


def damp_by(G, damp=0.1):
    return G + damp * G.diagonal().diag()


def exact(W, G, mask):
    """The weights of least error under the mask, row by row in float64."""
    W, G, Z = W.double().cpu(), G.double().cpu(), torch.zeros(W.shape, dtype=torch.float64)
    for w, kept, z in zip(W, mask.cpu(), Z, strict=True):
        if kept.any():
            # gelsd returns the smallest correction where several are equally good.
            removed = (G[kept][:, ~kept] @ w[~kept])[:, None]
            z[kept] = w[kept] + torch.linalg.lstsq(G[kept][:, kept], removed, driver="gelsd").solution[:, 0]
    return Z.to(DEVICE)


def random_mask():
    return uniform(ROWS, D, seed=7) < 0.4


def scaled_gram(d=D):
    """A Gram matrix of inputs of very different size."""
    scale = torch.logspace(-2, 2, d, device=DEVICE)
    return gram(d) * (scale * scale[:, None])


def rank_deficient_gram(d=D):
    """A Gram matrix of fewer tokens than inputs, with two equal inputs and two nearly equal ones."""
    X = normal(10, d, seed=3)
    X[:, 1] = X[:, 0]
    X[:, 3] = X[:, 2] * (1 + 1e-4)
    return X.T @ X


def run(W, G, mask, steps, start=None, backend=TORCH):
    return refit(W, G, mask, W.float() if start is None else start, steps, backend=backend)


class TestRefit:
    @pytest.mark.parametrize("make", [gram, scaled_gram])
    @pytest.mark.parametrize("damp", [0.0, 0.1])
    def test_ends_at_the_exact_solution(self, make, damp):
        W, G, mask = normal(ROWS, D), damp_by(make(D), damp), random_mask()
        # Entries outside of the mask are not read.
        start = normal(ROWS, D, seed=1).masked_fill(~mask, torch.nan)
        best, scale = exact(W, G, mask), G.diagonal().double().sqrt()
        fit = run(W, G, mask, 40)
        torch.testing.assert_close(fit.Z * scale, best * scale, rtol=0, atol=1e-4 * (best * scale).abs().max().item())
        for other in (fit, run(W, G, mask, 60, start)):
            torch.testing.assert_close(error(W, other.Z, G), error(W, best, G), rtol=1e-5, atol=0)
        assert error(W, W * mask, G).sum() > 1.3 * error(W, best, G).sum()
        assert torch.equal(run(W, G, mask, 0, start).Z, start.masked_fill(~mask, 0))

    @pytest.mark.parametrize("damp", [0.1, 0.0])
    def test_rank_deficient(self, damp):
        """With damping the solution is unique; without it, only its error is."""
        W, mask, G = normal(ROWS, D), random_mask(), damp_by(rank_deficient_gram(), damp)
        mask[:, :4] = True
        fit, best = run(W, G, mask, 20), exact(W, G, mask)
        excess = error(W, fit.Z, G) - error(W, best, G)
        assert (excess <= 1e-4 * error(W, W * mask, G)).all()
        if damp:
            torch.testing.assert_close(fit.Z.double(), best, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("make", [gram, scaled_gram, rank_deficient_gram])
    def test_no_step_raises_the_error(self, make):
        W, G, mask = normal(ROWS, D), make(D), random_mask()
        start = last = error(W, W * mask, G)
        for steps in range(1, 30):
            now = error(W, run(W, G, mask, steps).Z, G)
            # An error far below the start's is rounding of the start's.
            assert (now <= last * (1 + 1e-6) + 1e-6 * start).all(), steps
            last = now

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_residual_and_error_are_those_of_the_weights(self, steps):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        before = [X.clone() for X in (W, G, mask)]
        fit = run(W, G, mask, steps)
        R = (W.double() - fit.Z.double()) @ G.double()
        torch.testing.assert_close(fit.R.double(), R, rtol=0, atol=1e-5 * R.abs().max().item())
        torch.testing.assert_close(fit.error.double(), error(W, fit.Z, G), rtol=1e-5, atol=0)
        assert (fit.Z[~mask] == 0).all()
        assert_equal([W, G, mask], before)

    def test_dead_inputs_stay_and_rows_without_weights_stay_empty(self):
        W, G, mask = normal(ROWS, D), gram(D), random_mask()
        G[3], G[:, 3], mask[2] = 0, 0, False
        mask[4:, 3] = True
        fit = run(W, G, mask, 5)
        assert torch.equal(fit.Z[:, 3], (W * mask)[:, 3])
        assert (fit.Z[2] == 0).all()
        assert fit.Z.isfinite().all()
        assert inverse_diagonal(torch.diag(torch.tensor([4.0, 0.5, 0, 1e-40]))).tolist() == [0.25, 2, 0, 0]

    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    @pytest.mark.parametrize("operations", [cpu, triton_ops])
    def test_low_precision_gains_nearly_as_much(self, precision, operations):
        W, G, mask = normal(ROWS, D), damp_by(gram(D)), random_mask()
        exactly, fit = run(W, G, mask, 4), run(W, G, mask, 4, backend=Backend(operations, precision))
        if operations is cpu or precision == "bf16" or DEVICE == "cuda":
            # Triton's interpreter multiplies fp32 operands as they are.
            assert not torch.equal(fit.Z, exactly.Z)
        gain = error(W, W * mask, G) - error(W, exactly.Z, G)
        most = {"tf32": 1e-4, "bf16": 1e-2}[precision]
        assert (error(W, fit.Z, G) - error(W, exactly.Z, G)).sum() < most * gain.sum()

    def test_rows_with_the_lower_error_are_taken(self):
        """A row with an equal error stays; NaN is never better."""

        def fit(value, errors):
            full = torch.full((4, 3), float(value))
            return RowFit(full > 1, full.clone(), 10 * full, torch.tensor(errors))

        one, two = fit(1, [1.0, 1.0, 1.0, 1.0]), fit(2, [2.0, 1.0, 0.5, torch.nan])
        assert one.take_better(two).tolist() == [False, False, True, False]
        assert one.Z[:, 0].tolist() == [1, 1, 2, 1]
        assert one.R[:, 2].tolist() == [10, 10, 20, 10]
        assert one.mask.any(1).tolist() == [False, False, True, False]
        assert one.error.tolist() == [1, 1, 0.5, 1]


def mixed_gram(d, seed):
    """A Gram matrix of inputs that mix the same few sources, so that kept weights can make up for much."""
    X = torch.randn(4 * d, d // 2, generator=generator(seed)) @ torch.randn(d // 2, d, generator=generator(seed + 1))
    X += torch.randn(4 * d, d, generator=generator(seed + 2))
    return damp_by(X.T @ X).to(DEVICE)


def make_problem(rows=48, d=40, sparsity="0.6", k=None):
    W, G, pattern = normal(rows, d), mixed_gram(d, 10), patterns.parse(sparsity)
    saliency = wanda(W, G)
    k = stack.kept(saliency, [slice(None)], pattern) if k is None else k
    return problem_of(W, G, saliency, k, pattern.group)


def solve(problem, *, steps=24, rounds=3, refit_steps=6, backend=TORCH):
    """Frank-Wolfe, then re-selection from its mask."""
    mask = frank_wolfe.solve(problem, warm_of(problem, backend), penalty_schedule(steps, 1.0), backend=backend).mask
    options = {"steps": steps, "penalty": 1.0, "refit_steps": refit_steps, "rounds": rounds}
    return reselect(problem, mask, **options, backend=backend)


@pytest.fixture
def tried(monkeypatch):
    """The masks that are refitted."""
    masks = []
    monkeypatch.setattr(module, "refit", lambda W, G, mask, *a, **o: masks.append(mask) or refit(W, G, mask, *a, **o))
    return masks


class TestReselect:
    @pytest.mark.parametrize("sparsity", PATTERNS)
    def test_budget_error_and_never_worse_than_a_refit(self, sparsity, tried):
        problem = make_problem(sparsity=sparsity)
        before = [X.clone() for X in (problem.W, problem.H)]
        alone = solve(problem, rounds=0)
        assert len(tried) == 1
        fit = solve(problem)
        assert len(tried) == 1 + 5
        for mask in (*tried, fit.mask):
            assert_budget(problem, mask)
        assert (fit.Z[~fit.mask] == 0).all()
        truth, refitted = error(problem.W, fit.Z, problem.H), error(problem.W, alone.Z, problem.H)
        torch.testing.assert_close(fit.error.double(), truth, rtol=1e-4, atol=0)
        assert (truth <= refitted * (1 + 1e-5)).all()
        assert truth.sum() < 0.97 * refitted.sum()
        assert_equal([problem.W, problem.H], before)

    @pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
    def test_a_row_that_overflows_spoils_no_other(self, backend):
        problem = make_problem(rows=8)
        options = {"steps": 3, "penalty": 1.0, "refit_steps": 1, "rounds": 1, "backend": backend}
        warm = warm_of(problem)
        expected = reselect(problem, warm, **options)
        problem.W[3, ~warm[3]] = 1e30
        fit = reselect(problem, warm, **options)
        assert fit.error.isfinite().tolist() == [n != 3 for n in range(8)]
        others = torch.arange(8, device=DEVICE) != 3
        assert torch.equal(fit.error[others], expected.error[others])
        assert torch.equal(fit.mask[others], expected.mask[others])

    def test_reruns_are_bit_identical_and_kernels_agree(self):
        problem = make_problem(rows=11)
        first, second, other = (solve(problem, steps=6, rounds=1, backend=b) for b in (TORCH, TORCH, TRITON))
        assert torch.equal(first.mask, second.mask)
        assert torch.equal(first.Z, second.Z)
        assert_budget(problem, other.mask)
        # A nearly tied entry may go either way.
        torch.testing.assert_close(first.error.sum(), other.error.sum(), rtol=5e-3, atol=0)
        assert (first.mask != other.mask).sum() <= 6

    @pytest.mark.parametrize("k", [0, 40])
    def test_nothing_and_everything(self, k):
        problem = make_problem(rows=5, k=k)
        assert torch.equal(solve(problem).Z, problem.W if k else torch.zeros_like(problem.W))

    def test_rows_of_eight_against_every_mask(self):
        """Most rows find the best mask with its exact weights, and no row is far from it."""
        problem = make_problem(rows=40, d=8, k=3)
        fit, W, G = solve(problem, rounds=6, refit_steps=12), problem.W, problem.H
        errors = []
        for kept in itertools.combinations(range(8), 3):
            mask = torch.zeros_like(W, dtype=torch.bool)
            mask[:, list(kept)] = True
            errors.append(error(W, exact(W, G, mask), G))
        best = torch.stack(errors).amin(0)
        ratio, alone = (error(W, x.Z, G) / best for x in (fit, solve(problem, rounds=0, refit_steps=12)))
        assert (ratio >= 1 - 1e-5).all()
        assert ratio.mean() - 1 < 0.5 * (alone.mean() - 1)
        assert (ratio < 1 + 1e-4).double().mean() >= 0.75
        assert ratio.max() < 1.6
