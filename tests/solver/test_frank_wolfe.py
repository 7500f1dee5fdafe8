"""Frank-Wolfe against brute force, float64 and its own invariants."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.families import first_is_fast
from helpers.problems import assert_budget, exhaustive, make_problem, problem_of, warm_of

from sparsefw.kernels import cpu, plain
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import frank_wolfe, paper
from sparsefw.solver.frank_wolfe import or_warm_start, penalty_schedule
from sparsefw.solver.methods import SALIENCIES
from sparsefw.solver.targets import damped

PATTERNS = ("0.6", "layer:0.6", "2:4", "3:5")


def solve(problem, steps=60, penalty=1.0, **options):
    """The solution that a run takes: never worse than the warm start."""
    warm = warm_of(problem)
    return or_warm_start(frank_wolfe.solve(problem, warm, penalty_schedule(steps, penalty), **options), warm)


def with_target(problem):
    """The problem with weights that approximate others."""
    gap = 0.3 * torch.randn(problem.W.shape, generator=torch.Generator().manual_seed(8))
    return replace(problem, target_gap=gap)


def error(problem, mask):
    """The error of a mask by its definition, float64."""
    gap = 0 if problem.target_gap is None else problem.target_gap.double()
    E = gap + problem.W.double() * (1 - mask.double())
    return (E * (E @ problem.exact.double())).sum(1)


def check_errors(problem, solution):
    """The errors of the solution's mask and of the warm start are those of the definition."""
    for found, mask in ((solution.error, solution.mask), (solution.error_warm_start, warm_of(problem))):
        torch.testing.assert_close(found.double(), error(problem, mask), rtol=1e-5, atol=0)


class TestIterates:
    @pytest.mark.parametrize("sparsity", PATTERNS)
    @pytest.mark.parametrize(("alpha", "penalty"), [(0.0, 1.0), (0.5, 0.0), (0.5, 1.0)])
    def test_every_one_is_feasible(self, sparsity, alpha, penalty):
        problem = make_problem(7, 20, sparsity, alpha)
        for state in frank_wolfe.iterate(problem, warm_of(problem), penalty_schedule(12, penalty)):
            assert state.M.min() >= 0
            assert state.M.max() <= 1
            sums = state.M.double().view(7, -1, problem.group or 20).sum(2)
            budget = problem.k[:, None] if isinstance(problem.k, torch.Tensor) else problem.k
            assert (sums <= budget + 1e-5).all()
            assert problem.fixed is None or (state.M[problem.fixed] == 1).all()

    @pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
    def test_line_search_never_raises_the_error_without_penalty(self, sparsity):
        problem = make_problem(9, 24, sparsity)
        last = TORCH.errors(plain.removed(problem.W, warm_of(problem)), problem.G)
        gaps = []
        for state in frank_wolfe.iterate(problem, warm_of(problem), penalty_schedule(100, 0.0)):
            assert (state.error <= last * (1 + 1e-5)).all()
            gaps.append(state.error - frank_wolfe.lower_bound(problem, state))
            assert (gaps[-1] >= -1e-4 * state.error).all()
            last = state.error.clone()
        assert gaps[-1].sum() < 0.1 * gaps[0].sum()

    @pytest.mark.parametrize("target", [False, True])
    def test_residual_and_error_stay_true(self, target):
        """R and the error are carried along by recursion; after many steps they still match their definitions."""
        problem = make_problem(6, 33, "0.5", 0.5)
        problem = with_target(problem) if target else problem
        *_, state = frank_wolfe.iterate(problem, warm_of(problem), penalty_schedule(60, 1.0))
        removed = problem.W.double() * (1 - state.M.double())
        R = (removed + (problem.target_gap if target else 0)) @ problem.H.double()
        torch.testing.assert_close(state.R.double(), R, rtol=0, atol=1e-5 * R.abs().max().item())
        torch.testing.assert_close(state.error.double(), (removed * R).sum(1), rtol=1e-4, atol=1e-3)


class TestSolve:
    @pytest.mark.parametrize("target", [False, True])
    @pytest.mark.parametrize("damp", first_is_fast([0.2, 0.0]))
    @pytest.mark.parametrize(("alpha", "penalty", "swaps"), [(0.0, 1.0, 0), (0.0, 1.0, 50), (0.5, 0.0, 0)])
    def test_against_exhaustive_search(self, alpha, penalty, swaps, damp, target):
        """On rows of 12 the bound holds, and the mask never beats the optimum and comes close to it."""
        problem = make_problem(8, 12, "0.5", alpha)
        problem = with_target(problem) if target else problem
        optimum, H = exhaustive(problem), damped(problem.G, damp)
        solution = solve(replace(problem, H=H), 60, penalty, swaps=swaps)
        check_errors(problem, solution)
        warm = error(problem, warm_of(problem))
        assert (solution.bound <= optimum + 1e-5 * warm).all()
        # With a penalty or a target the bound may be far below.
        assert target or penalty or solution.bound.sum() > 0.1 * optimum.sum()
        assert (solution.error >= optimum - 1e-5 * warm).all()
        assert_budget(problem, solution.mask)
        if not alpha:
            assert (solution.error - optimum).sum() < 0.5 * (warm - optimum).sum()

    @pytest.mark.parametrize("sparsity", [*PATTERNS, "1:20"])
    @pytest.mark.parametrize("open_loop", first_is_fast([False, True]))
    @pytest.mark.parametrize("warm_start", SALIENCIES)
    def test_exact_budget_and_never_worse_than_the_warm_start(self, sparsity, open_loop, warm_start):
        problem = make_problem(7, 20, sparsity, 0.5, warm_start=warm_start)
        schedule, warm = penalty_schedule(10, 1.0), warm_of(problem)
        solution = frank_wolfe.solve(problem, warm, paper.open_loop(schedule) if open_loop else schedule)
        solution = or_warm_start(solution, warm)
        assert_budget(problem, solution.mask)
        assert (solution.error <= solution.error_warm_start).all()
        assert torch.equal(solution.error_mask, solution.error)
        check_errors(problem, solution)

    def test_no_steps_give_the_warm_start(self):
        problem = make_problem(4, 10)
        warm = warm_of(problem)
        assert torch.equal(solve(problem, 0).mask, warm)
        swapped = frank_wolfe.solve(problem, warm, [], swaps=50)
        assert swapped.error.sum() < swapped.error_warm_start.sum()
        assert torch.equal(warm_of(problem), warm)

    def test_dead_inputs_and_empty_rows(self):
        problem = make_problem(4, 10)
        problem.G[3] = problem.G[:, 3] = 0
        problem.W[2] = 0
        solution = solve(problem, 5)
        assert_budget(problem, solution.mask)
        assert solution.error[2] == 0

    @pytest.mark.parametrize("damp", [0.0, 1.0])
    def test_errors_are_those_of_fp32_whatever_the_precision(self, damp):
        problem = make_problem(6, 30)
        chosen = replace(problem, H=damped(problem.G, damp))
        check_errors(problem, solve(chosen, 8, swaps=3, backend=Backend(cpu, "bf16")))


class TestDamping:
    """Masks are chosen on the damped matrix; errors and bounds are on the one without damping."""

    @pytest.mark.parametrize("swaps", [0, 50])
    def test_masks_are_those_of_the_damped_matrix(self, swaps):
        problem = make_problem(30, 16, "0.5")
        H = damped(problem.G, 0.5)
        solution, by_hand, undamped = (
            frank_wolfe.solve(p, warm_of(p), penalty_schedule(40, 1.0), swaps=swaps)
            for p in (replace(problem, H=H), replace(problem, G=H, H=H, exact=H), problem)
        )
        assert (solution.mask == by_hand.mask).all(1).double().mean() >= 0.9
        assert (solution.mask == undamped.mask).all(1).double().mean() < 0.9


def papers_algorithm(W, G, saliency, k, unit, alpha, steps):
    """SparseFW as published, line by line, in float64.

    `unit` is the shape in which a budget k covers a row: (1, -1) for the paper's C_k over the whole matrix, the
    matrix's own for one budget per row, (-1, m) for n:m. Fixed entries are cut per row, or from the whole matrix.
    """
    W, G, saliency = W.double(), G.double(), saliency.double()

    def top(scores, shape, count, positive=False):
        mask = torch.zeros_like(scores).view(shape)
        for row, score in zip(mask, scores.view(shape), strict=True):
            for j in sorted(range(len(score)), key=lambda j: -score[j].item())[:count]:
                row[j] = float(score[j] > 0 or not positive)
        return mask.view(W.shape)

    warm = top(saliency, unit, k)
    rows = unit if unit == (1, -1) else W.shape
    fixed = top(saliency * warm, rows, int(alpha * warm.view(rows)[0].sum().item()))
    H = W @ G
    M = warm - fixed
    for t in range(steps):
        gradient = -2 * W * (H - (W * (M + fixed)) @ G)
        V = top(torch.where(fixed.bool(), torch.inf, -gradient), unit, k, positive=True) - fixed
        eta = 2 / (t + 2)
        M = (1 - eta) * M + eta * V
    return M + fixed, top(torch.where(fixed.bool(), torch.inf, M), unit, k).bool()


class TestPaper:
    @pytest.mark.parametrize("sparsity", first_is_fast(["layer:0.6", "2:4", "0.6"], 2))
    @pytest.mark.parametrize("alpha", first_is_fast([0.9, 0.0]))
    def test_matches_a_transcription(self, sparsity, alpha):
        whole = sparsity.startswith("layer")
        problem, backend = make_problem(6, 20, sparsity, alpha, whole=whole), paper.WholeMatrix(cpu) if whole else TORCH
        warm = warm_of(problem, backend)
        unit = (1, -1) if whole else (-1, problem.group or 20)

        def transcribed(steps):
            return papers_algorithm(problem.W, problem.H, problem.saliency, problem.k, unit, alpha, steps)

        schedule = paper.open_loop(penalty_schedule(300, 0.0))
        *_, state = frank_wolfe.iterate(problem, warm, schedule[:12], backend=backend)
        torch.testing.assert_close(state.M.double(), transcribed(12)[0], rtol=0, atol=1e-6)
        solution = frank_wolfe.solve(problem, warm, schedule, backend=backend)
        # After 300 steps in fp32 and float64 the errors agree; single entries may differ where M is nearly tied.
        expected = transcribed(300)[1]
        truth = error(problem, expected).sum()
        torch.testing.assert_close(solution.error.double().sum(), truth, rtol=1e-3, atol=0)
        assert (solution.mask != expected).sum() <= 2

    def test_the_bound_of_a_whole_matrix_holds_for_every_split_of_the_budget(self):
        whole = paper.WholeMatrix(cpu)
        problem = make_problem(4, 4, "layer:0.5", whole=True)
        schedule = paper.open_loop(penalty_schedule(100, 0.0))
        solution = frank_wolfe.solve(problem, warm_of(problem, whole), schedule, backend=whole)
        errors = []
        for kept in itertools.combinations(range(16), 8):
            E = problem.W.double().clone()
            E.view(-1)[list(kept)] = 0
            errors.append((E * (E @ problem.H.double())).sum())
        assert 0.2 * min(errors) < solution.bound.sum() <= min(errors) * (1 + 1e-5)
        assert solution.mask.sum() == 8

    def test_fixed_entries_are_the_most_salient_of_the_warm_start(self):
        """Under 2:4 the warm start lacks the third best entry of the row, whose group has two better ones."""
        saliency = torch.tensor([[9.0, 8, 7, 1, 6, 5, 2, 1]])
        for group, kept, expected in ((0, 4, [0, 1, 2]), (4, 2, [0, 1, 4])):
            problem = problem_of(torch.ones(1, 8), torch.eye(8), saliency, kept, group)
            assert paper.fixed_entries(problem, warm_of(problem), 0.75, TORCH).nonzero()[:, 1].tolist() == expected

    @pytest.mark.parametrize(("alpha", "kept", "count"), [(0.29, 100, 29), (0.1, 30, 3), (0.5, 5, 2), (1.0, 7, 7)])
    def test_their_number_is_the_floor_of_the_exact_product(self, alpha, kept, count):
        """0.29 * 100 is 28.999... in floating point."""
        for k in (kept, torch.tensor([kept, kept])):
            problem = problem_of(torch.ones(2, 200), torch.eye(200), torch.rand(2, 200), k)
            assert paper.fixed_entries(problem, warm_of(problem), alpha, TORCH).sum(1).tolist() == [count, count]
