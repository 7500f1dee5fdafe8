"""The solver against brute force, finite differences, float64 transcriptions and its own invariants."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.problems import LINE_SEARCH, TRITON, exhaustive, make_problem, penalized_error
from torch.utils._python_dispatch import TorchDispatchMode

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver import frank_wolfe
from sparsefw.solver.objective import mask_error
from sparsefw.solver.saliency import SALIENCIES

# Operations that make the host wait for their result.
WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero)


class TestGradient:
    @pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
    def test_score_is_the_negative_gradient_by_finite_differences(self, theta):
        """The vertex that the row step picks is that of the numerical gradient."""
        problem = make_problem(5, 11)
        W, G = problem.W.double(), problem.G.double()
        M = torch.rand(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        numeric, h = torch.empty_like(M), 1e-6
        for j in range(M.shape[1]):
            step = torch.zeros_like(M)
            step[:, j] = h
            rise = penalized_error(W, G, M + step, theta) - penalized_error(W, G, M - step, theta)
            numeric[:, j] = rise / (2 * h)
        R = ((W * (1 - M)) @ G).float()
        q = W**2 * G.diagonal()
        exact = -2 * W * R.double() + theta * q * (1 - 2 * M)
        torch.testing.assert_close(numeric, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
        V, E = torch.zeros(5, 11, dtype=torch.bool), torch.empty(5, 11)
        state = (M.float(), R, R.clone(), V, E)
        cpu.row_step(problem.W, problem.G.diagonal(), *state, 4, eta=0.0, next_theta=theta)
        assert torch.equal(V, cpu.lmo(-numeric.float(), 4, positive=theta < 1))

    @pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
    def test_line_search_is_the_minimum_along_the_segment(self, theta):
        problem = make_problem(6, 20)
        W, G = problem.W, problem.G
        M = (problem.warm.float() + torch.rand(6, 20, generator=torch.Generator().manual_seed(2))) / 2
        V = cpu.lmo(torch.randn(6, 20, generator=torch.Generator().manual_seed(3)), 8)
        R, U = (W * (1 - M)) @ G, (W * ~V) @ G
        start, direction = M.double(), V.double() - M.double()
        eta, _ = cpu.row_step(W, G.diagonal(), M, R, U, V, torch.empty_like(W), 8, theta=theta, next_theta=theta)

        def along(step):
            return penalized_error(W.double(), G.double(), start + step * direction, theta)

        lowest = torch.stack([along(step) for step in torch.linspace(0, 1, 2001, dtype=torch.float64)]).amin(0)
        assert (along(eta.double()[:, None]) <= lowest * (1 + 1e-6)).all()


@pytest.mark.parametrize(("precision", "errors"), [("ieee", "ieee"), ("tf32", "tf32x3"), ("bf16", "tf32x3")])
def test_errors_are_those_of_fp32_whatever_the_precision(precision, errors, monkeypatch):
    seen, product = [], cpu.product

    def spy(E, G, *, precision, out=None):
        seen.append((precision, G.dtype))
        return product(E, G, precision=precision, out=out)

    monkeypatch.setattr(cpu, "product", spy)
    problem, options = make_problem(6, 30), dict(steps=8, penalty=1.0, swaps=3, backend=Backend(cpu, precision))
    exactly = (errors, torch.float32)
    # Without damping, the iteration starts from the product of the warm start's error.
    frank_wolfe.solve(problem, **options)
    assert seen == 3 * [exactly]
    seen.clear()
    frank_wolfe.solve(replace(problem, damped=problem.G.clone()), **options)
    # The products of the warm start, of the start of the swaps, and of the mask; those of the iteration are in between.
    assert [seen[0], *seen[-2:]] == 3 * [exactly]
    assert {one for one, _ in seen[1:-2]} == {precision}


class TestIterates:
    @pytest.mark.parametrize("sparsity", ["0.6", "layer:0.6", "2:4", "3:5"])
    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    @pytest.mark.parametrize("penalty", [0.0, 1.0])
    def test_every_iterate_is_feasible(self, sparsity, alpha, penalty):
        problem = make_problem(7, 20, sparsity, alpha)
        width = problem.group or 20
        for state in frank_wolfe.iterate(problem, steps=12, penalty=penalty, **LINE_SEARCH):
            assert state.M.min() >= 0
            assert state.M.max() <= 1
            sums = state.M.double().view(7, -1, width).sum(2)
            budget = problem.k[:, None] if isinstance(problem.k, torch.Tensor) else problem.k
            assert (sums <= budget + 1e-5).all()
            if problem.fixed is not None:
                assert (state.M[problem.fixed] == 1).all()

    @pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
    def test_line_search_never_raises_the_error_without_penalty(self, sparsity):
        problem = make_problem(9, 24, sparsity)
        last = mask_error(problem.W, problem.warm, problem.G)
        for state in frank_wolfe.iterate(problem, steps=40, penalty=0.0, **LINE_SEARCH):
            assert (state.error <= last * (1 + 1e-5)).all()
            last = state.error.clone()

    def test_residual_and_error_stay_true(self):
        """R and the error are carried along by recursion; after many steps they still match their definitions."""
        problem = make_problem(6, 33, "0.5", 0.5)
        for _state in frank_wolfe.iterate(problem, steps=60, penalty=1.0, **LINE_SEARCH):
            pass
        E = problem.W.double() * (1 - _state.M.double())
        R = E @ problem.G.double()
        torch.testing.assert_close(_state.R.double(), R, rtol=0, atol=1e-5 * R.abs().max().item())
        torch.testing.assert_close(_state.error.double(), (E * R).sum(1), rtol=1e-4, atol=0)

    def test_torch_on_a_cpu_follows_the_changes(self, monkeypatch):
        """The steps are the same up to rounding. `VertexProducts` makes all products but those of the start."""
        problem, product = make_problem(6, 33, "0.5", 0.5), cpu.product
        scratch = LINE_SEARCH | {"backend": Backend(SimpleNamespace(**vars(cpu)))}
        for target_gap in (None, 0.1 * problem.W.roll(1, 1)):
            problem, made = replace(problem, target_gap=target_gap), []

            def count(*args, made=made, **options):
                made.append(1)
                return product(*args, **options)

            *_, expected = frank_wolfe.iterate(problem, steps=20, penalty=1.0, **scratch)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "product", count)
                *_, state = frank_wolfe.iterate(problem, steps=20, penalty=1.0, **LINE_SEARCH)
            assert len(made) == 1
            torch.testing.assert_close(state.M, expected.M, rtol=0, atol=1e-4)
            torch.testing.assert_close(state.error, expected.error, rtol=1e-4, atol=0)

    def test_gap_is_never_negative_and_closes(self):
        problem = make_problem(8, 16, "0.5")
        gaps = []
        for state in frank_wolfe.iterate(problem, steps=200, penalty=0.0, **LINE_SEARCH):
            gaps.append(state.error - frank_wolfe.lower_bound(problem, state))
            assert (gaps[-1] >= -1e-4 * state.error).all()
        assert gaps[-1].sum() < 0.1 * gaps[0].sum()


class TestSolve:
    @pytest.mark.parametrize("seed", range(4))
    def test_against_exhaustive_search(self, seed):
        """On rows of 12 the bound holds, and the mask is feasible, never beats the optimum and comes close to it."""
        problem = make_problem(8, 12, "0.5", seed=seed)
        optimum = exhaustive(problem)
        solution = frank_wolfe.solve(problem, steps=60)
        assert (solution.bound <= optimum * (1 + 1e-5)).all()
        assert (solution.error >= optimum * (1 - 1e-5)).all()
        warm = (solution.error_warm_start - optimum).sum()
        assert (solution.error - optimum).sum() < 0.5 * warm

    def test_bound_holds_among_masks_with_the_fixed_entries(self):
        problem = make_problem(8, 12, "0.5", alpha=0.5)
        solution = frank_wolfe.solve(problem, steps=60, penalty=0.0)
        W, G = problem.W.double(), problem.G.double()
        for r in range(8):
            errors = []
            for kept in itertools.combinations(range(12), 6):
                if set(problem.fixed[r].nonzero().flatten().tolist()) <= set(kept):
                    e = W[r].clone()
                    e[list(kept)] = 0
                    errors.append(e @ G @ e)
            assert solution.bound[r] <= min(errors) * (1 + 1e-5)

    @pytest.mark.parametrize("sparsity", ["0.6", "layer:0.6", "2:4", "3:5", "1:20"])
    @pytest.mark.parametrize("step_rule", frank_wolfe.STEP_RULES)
    @pytest.mark.parametrize("warm_start", SALIENCIES)
    def test_exact_budget_and_never_worse_than_the_warm_start(self, sparsity, step_rule, warm_start):
        problem = make_problem(7, 20, sparsity, 0.5, warm_start=warm_start)
        solution = frank_wolfe.solve(problem, steps=10, step_rule=step_rule)
        kept = solution.mask.view(7, -1, problem.group or 20).sum(2)
        assert (kept == (problem.k[:, None] if isinstance(problem.k, torch.Tensor) else problem.k)).all()
        assert (solution.error <= solution.error_warm_start).all()
        assert solution.mask[problem.fixed].all()
        truth = penalized_error(problem.W.double(), problem.G.double(), solution.mask.double(), 0)
        torch.testing.assert_close(solution.error.double(), truth, rtol=1e-5, atol=0)

    def test_penalty_beats_the_plain_relaxation_after_rounding(self):
        problem = make_problem(64, 96, "0.6", correlation=0.3)
        plain = frank_wolfe.solve(problem, steps=60, penalty=0.0)
        penalty = frank_wolfe.solve(problem, steps=60)
        assert penalty.error.sum() < plain.error.sum() < plain.error_warm_start.sum()

    def test_no_steps_give_the_warm_start(self):
        problem = make_problem(4, 10)
        assert torch.equal(frank_wolfe.solve(problem, steps=0).mask, problem.warm)
        warm = problem.warm.clone()
        swapped = frank_wolfe.solve(problem, steps=0, swaps=50)
        assert swapped.error.sum() < swapped.error_warm_start.sum()
        assert torch.equal(problem.warm, warm)

    def test_rerun_is_bit_identical(self):
        problem = make_problem(16, 40)
        first, second = (frank_wolfe.solve(problem, steps=15) for _ in range(2))
        assert torch.equal(first.mask, second.mask)
        assert torch.equal(first.error, second.error)

    def test_dead_inputs_and_empty_rows(self):
        problem = make_problem(4, 10)
        problem.G[3] = problem.G[:, 3] = 0
        problem.W[2] = 0
        solution = frank_wolfe.solve(problem, steps=5)
        assert torch.equal(solution.mask.sum(1), torch.full((4,), 4))
        assert solution.error[2] == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
    @pytest.mark.parametrize("text", ["0.5", "2:4"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite_is_an_error(self, value, text, backend):
        problem = make_problem(4, 12, text)
        problem.G[0, 0] = value
        with pytest.raises(FloatingPointError, match="not finite"):
            frank_wolfe.solve(problem, steps=3, swaps=2, backend=backend)

    @pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
    def test_overflow_on_the_way_is_an_error(self, backend):
        """The warm start's error is finite, the damped matrix is not."""
        problem = make_problem(4, 12)
        H = problem.G.clone()
        H[:, 5] = H[5] = torch.inf
        with pytest.raises(FloatingPointError, match="not finite"):
            frank_wolfe.solve(replace(problem, damped=H), steps=3, backend=backend)

    @pytest.mark.parametrize("text", ["0.5", "2:4"])
    def test_waits_for_the_gpu_once(self, text):
        """The host waits for the check of the errors. Copies that the interpreter makes do not count."""
        waits = []

        class Waits(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.overloadpacket in WAITING:
                    waits.append(function)
                return function(*args, **(kwargs or {}))

        problem = make_problem(4, 12, text, 0.5)
        with Waits():
            problem = frank_wolfe.make_problem(
                problem.W, problem.G, problem.saliency, problem.k, group=problem.group, backend=TRITON
            )
            assert not waits
            frank_wolfe.solve(problem, steps=4, swaps=3, backend=TRITON)
        assert waits == [torch.ops.aten._local_scalar_dense.default]

    def test_bad_arguments(self):
        problem = make_problem(4, 10)
        with pytest.raises(ValueError, match="step_rule: expected one of line-search, open-loop, got 'newton'"):
            frank_wolfe.solve(problem, steps=3, step_rule="newton")
        with pytest.raises(ValueError, match="whole"):
            frank_wolfe.solve(make_problem(4, 10, "layer:0.5", whole_matrix=True), steps=3, penalty=1.0)
        with pytest.raises(ValueError, match="no swaps"):
            frank_wolfe.solve(make_problem(4, 10, "layer:0.5", whole_matrix=True), steps=3, penalty=0.0, swaps=1)


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
    @pytest.mark.slow
    @pytest.mark.parametrize("sparsity", ["layer:0.6", "0.6", "2:4"])
    @pytest.mark.parametrize("alpha", [0.0, 0.9])
    def test_preset_matches_a_transcription(self, sparsity, alpha):
        whole = sparsity.startswith("layer")
        problem = make_problem(6, 20, sparsity, alpha, whole_matrix=whole)
        unit = (1, -1) if whole else (-1, problem.group or 20)

        def transcribed(steps):
            return papers_algorithm(problem.W, problem.G, problem.saliency, problem.k, unit, alpha, steps)

        settings = {"step_rule": "open-loop", "penalty": 0.0}
        *_, state = frank_wolfe.iterate(problem, steps=12, backend=TORCH, **settings)
        torch.testing.assert_close(state.M.double(), transcribed(12)[0], rtol=0, atol=1e-6)
        solution = frank_wolfe.solve(problem, steps=300, fallback_to_warm_start=False, **settings)
        # After 300 steps in fp32 and float64 the errors agree; single entries may differ where M is nearly tied.
        expected = transcribed(300)[1]
        truth = penalized_error(problem.W.double(), problem.G.double(), expected.double(), 0).sum()
        torch.testing.assert_close(solution.error.double().sum(), truth, rtol=1e-3, atol=0)
        assert (solution.mask != expected).sum() <= 2


class TestRounding:
    def test_highest_entries_then_saliency_then_index(self):
        problem = make_problem(1, 8, "0.5")
        saliency = torch.tensor([[1.0, 2, 3, 4, 5, 6, 6, 8]])
        problem = frank_wolfe.make_problem(problem.W, problem.G, saliency, 4)
        M = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1]])
        assert frank_wolfe.round_mask(problem, M).tolist() == [[True, False, False, False, True, True, True, False]]
        M = torch.tensor([[0.9, 0.9, 0.9, 0.1, 0.1, 0.5, 0.5, 0.5]])
        saliency[0, 7] = 6
        assert frank_wolfe.round_mask(problem, M).tolist() == [[True, True, True, False, False, True, False, False]]

    def test_by_groups(self):
        saliency = torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5]])
        problem = frank_wolfe.make_problem(torch.ones(1, 8), torch.eye(8), saliency, 2, group=4)
        M = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5]])
        assert frank_wolfe.round_mask(problem, M).tolist() == [[False, False, True, True, False, True, True, False]]

    def test_nothing_and_everything(self):
        problem = make_problem(3, 8)
        for k in (0, 8):
            everything = frank_wolfe.make_problem(problem.W, problem.G, problem.saliency, k)
            assert frank_wolfe.round_mask(everything, torch.rand(3, 8)).sum() == 3 * k


class TestFixedEntries:
    def test_the_most_salient_of_the_warm_start(self):
        """Under 2:4 the warm start lacks the third best entry of the row, whose group has two better ones."""
        saliency = torch.tensor([[9.0, 8, 7, 1, 6, 5, 2, 1]])
        for group, kept in ((0, 4), (4, 2)):
            problem = frank_wolfe.make_problem(torch.ones(1, 8), torch.eye(8), saliency, kept, group=group, alpha=0.75)
            expected = [0, 1, 2] if group == 0 else [0, 1, 4]
            assert problem.fixed.nonzero()[:, 1].tolist() == expected

    @pytest.mark.parametrize(("alpha", "kept", "count"), [(0.29, 100, 29), (0.1, 30, 3), (0.5, 5, 2), (1.0, 7, 7)])
    def test_count_is_the_floor_of_the_exact_product(self, alpha, kept, count):
        """0.29 * 100 is 28.999... in floating point."""
        W, G, saliency = torch.ones(2, 200), torch.eye(200), torch.rand(2, 200)
        for k in (kept, torch.tensor([kept, kept])):
            assert frank_wolfe.make_problem(W, G, saliency, k, alpha=alpha).fixed.sum(1).tolist() == [count, count]
        assert frank_wolfe.make_problem(W, G, saliency, kept, alpha=alpha, whole_matrix=True).fixed.sum() == count

    def test_none_without_alpha(self):
        assert make_problem(3, 10, alpha=0.0).fixed is None
