"""row_step against the specification in float64, and against the definition of each of its parts."""

from itertools import pairwise

import pytest
import torch
from helpers import naive
from helpers.families import first_is_fast
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    assert_near,
    copied,
    garbage,
    gram,
    hard_scores,
    in_float64,
    normal,
    row_state,
)
from helpers.problems import problem_of, warm_of

from sparsefw.kernels import step as step_module
from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.solver import frank_wolfe


def solver_state(rows: int, d: int, k, group: int = 0, dtype: torch.dtype = torch.float32, **options):
    """A state in the middle of a solve: M inside the polytope, R and U its products, V a vertex."""
    W, G = normal(rows, d, dtype=dtype), gram(d)
    V = naive.lmo(normal(rows, d, seed=3), k, group=group)
    M = 0.3 * V + 0.7 * naive.lmo(normal(rows, d, seed=4), k, group=group)
    R, U = (W.float() * (1 - M)) @ G, (W.float() * ~V) @ G
    E = garbage(rows, d, dtype=options.pop("e_dtype", dtype))
    state = row_state(W, G.diagonal().contiguous(), M, R, U, V, E, k, group=group, **options)
    state.eta, state.error = garbage(rows), garbage(rows)
    return state


def check_step(backend, state, *, eta=None, theta=0.0, next_theta=0.0):
    """Compare floats with naive in float64, and the vertex with the LMO of the state that the step left."""
    start, truth = copied(state), in_float64(state)
    naive.row_step(truth, eta=eta, theta=theta, next_theta=next_theta)
    backend.row_step(state, eta=eta, theta=theta, next_theta=next_theta)
    # The terms of the line search nearly cancel, so rounding changes the step size, and everything after it.
    assert ((state.eta - truth.eta).abs() <= 2.0**-18).all()
    plain, exact = copied(start), in_float64(start)
    for other in (plain, exact):
        naive.row_step(other, eta=state.eta, next_theta=next_theta)
    for name in ("M", "R", "error"):
        assert_near(getattr(state, name), getattr(plain, name), getattr(exact, name))
    # Scores that differ by less than their rounding may swap, so the float64 choice is compared by its worst score.
    score = step_module.scores(in_float64(state), next_theta).float()
    V = naive.lmo(score, state.k, group=state.group, fixed=state.fixed, positive=next_theta < 1)
    assert (state.V != V).sum() <= 2 + V.numel() // 10000
    assert torch.equal(V.sum(1), state.V.sum(1))
    gap = torch.zeros_like(start.M) if state.target_gap is None else state.target_gap
    assert torch.equal(state.E, (gap + start.W.masked_fill(state.V, 0)).to(state.E.dtype))


FULL = dict(theta=1.0, next_theta=1.0)


@pytest.mark.parametrize(
    ("state", "numbers"),
    [
        ((37, 262, 100), dict(theta=0.4, next_theta=0.6)),
        *first_is_fast(
            [((37, 262, 100), numbers) for numbers in (dict(eta=0.25, theta=0.4, next_theta=0.6), {}, FULL)]
        ),
        *[(shape, dict(next_theta=1.0)) for shape in ((1, 1, 0), (1, 1, 1), (5, 131, 0), (5, 131, 131))],
        *[((20, 6 * m, n, m), numbers) for n, m in ((1, 3), (16, 32)) for numbers in ({}, FULL)],
    ],
)
def test_rows_and_groups(row_backend, state, numbers):
    check_step(row_backend, solver_state(*state), **numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(row_backend, dtype):
    """The removed weights, with what the weights lack, are rounded to nearest."""
    check_step(row_backend, solver_state(20, 131, 50, dtype=dtype), theta=0.2, next_theta=0.4)
    state = solver_state(20, 132, 2, 4, dtype=dtype, e_dtype=torch.bfloat16, target_gap=normal(20, 132, seed=8))
    check_step(row_backend, state, theta=0.2, next_theta=0.4)


@pytest.mark.parametrize("next_theta", [0.5, 1.0])
def test_a_budget_per_row(row_backend, next_theta):
    check_step(row_backend, solver_state(37, 131, torch.arange(37, device=DEVICE) * 101 % 132), next_theta=next_theta)


@pytest.mark.parametrize(("k", "group"), [(60, 0), (2, 4)])
def test_fixed_entries_are_kept(row_backend, k, group):
    fixed = naive.lmo(normal(37, 132, seed=9), k // 2, group=group)
    state = solver_state(37, 132, k, group, fixed=fixed)
    check_step(row_backend, state, next_theta=0.5)
    assert (state.V | ~fixed).all()


def test_only_positive_scores_are_taken_before_the_penalty_is_full(row_backend):
    state = solver_state(3, 131, 40)
    state.R, state.U = -state.W, -state.W
    row_backend.row_step(state)
    assert not state.V.any()


def test_a_nan_shows_in_the_error_of_its_row(row_backend):
    state = solver_state(3, 131, 40)
    state.U[1, 7] = torch.nan
    row_backend.row_step(state)
    assert state.error.isnan().tolist() == [False, True, False]


def test_one_row_a_program(monkeypatch):
    """Compiled kernels have such tiles, and no mask of rows; the interpreter takes many rows at once."""
    monkeypatch.setattr(step_module, "configuration", lambda *_: dict(BLOCK_R=1, BLOCK_D=256, SEARCH_D=256))
    check_step(triton_ops, solver_state(5, 131, 50), theta=0.2, next_theta=0.4)
    check_step(triton_ops, solver_state(5, 132, 2, 4), theta=0.2, next_theta=0.4)


def state_of_scores(score: torch.Tensor, k, threshold: torch.Tensor):
    """A state whose next scores are `score`, finite numbers, for a step that does not move (eta = 0)."""
    half, zeros = torch.full_like(score, 0.5), torch.zeros_like(score)
    matrices = zeros.clone(), score.clone(), score.clone(), zeros.bool(), garbage(*score.shape)
    return row_state(half, zeros[0].clone(), *matrices, k, threshold=threshold)


def finite_scores(rows: int, d: int) -> dict[str, torch.Tensor]:
    """Hard scores for the search, and rows of ties."""
    tied = dict(equal=torch.ones(rows, d), few=(2 * normal(rows, d)).round().cpu())
    tied["denormal"] = (normal(rows, d) * 8).round().cpu() * 2.0**-148
    tied["signed zeros"] = torch.zeros(rows, d).copysign(normal(rows, d).cpu())
    scores = hard_scores(rows, d) | {name: score.to(DEVICE) for name, score in tied.items()}
    return {name: score.clamp(-3e38, 3e38) for name, score in scores.items()}


STARTS = (0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1e-3, 1e30)


def test_a_search_may_start_from_any_threshold(row_backend):
    # A row for every start with every second budget: next to each other, the two theta have all pairs.
    pairs = [(k, start) for k in (0, 1, 2, 80, 199, 200) for start in STARTS]
    for next_theta in (0.0, 1.0):
        k, threshold = (torch.tensor(x, device=DEVICE) for x in zip(*pairs[int(next_theta) :: 2], strict=True))
        score = torch.cat([*finite_scores(len(k), 200).values()])
        k, threshold = (x.repeat(len(score) // len(k)) for x in (k, threshold))
        state = state_of_scores(score, k, threshold)
        row_backend.row_step(state, eta=0.0, next_theta=next_theta)
        assert torch.equal(state.V, naive.lmo(score, k, positive=next_theta < 1))


def test_a_nan_ends_a_search_from_any_threshold(row_backend):
    for number in (1, 60, 131):
        state = state_of_scores(normal(len(STARTS), 131), 60, torch.tensor(STARTS, device=DEVICE))
        state.R[:, :number] = torch.nan
        row_backend.row_step(state, eta=0.0, next_theta=1.0)
        assert state.error.isnan().all()


def test_a_solve_carries_thresholds_from_step_to_step():
    # Powers of two: their products are exact, so a compiler that contracts products and sums changes no score.
    W, G = (2 ** normal(9, 40).round()).copysign(normal(9, 40, seed=1)), gram(40)
    G = (G / G.diagonal().outer(G.diagonal()).sqrt()).fill_diagonal_(1)
    problem, last = problem_of(W, G, W.abs(), 16), None
    schedule = [*pairwise([0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0])]
    steps = frank_wolfe.iterate(problem, warm_of(problem), schedule, backend=Backend(triton_ops))
    for (_, theta), state in zip(schedule, steps, strict=True):
        q = problem.W**2 * problem.H.diagonal()
        score = 2 * problem.W * state.R - theta * q * (1 - 2 * state.M)
        assert torch.equal(score >= state.threshold[:, None], state.V)
        assert last is None or not torch.equal(state.threshold, last)
        last = state.threshold.clone()
