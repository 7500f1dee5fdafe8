"""The references themselves: against definitions and exhaustive search, in float64."""

import itertools

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import DEVICE, gram, normal, row_state, uniform

from sparsefw.kernels import plain


def error(W, G, M, theta=0.0, gap=0.0):
    """error(M) + theta sum(q M (1 - M)), per row, from the definition."""
    E = gap + W * (1 - M)
    q = W**2 * G.diagonal()
    return (E * (E @ G)).sum(1) + theta * (q * M * (1 - M)).sum(1)


def step_state(gap=None):
    """G, and a state in the middle of a solve, float64."""
    W, G = normal(6, 23).double(), gram(23).double()
    V, corner = (naive.lmo(normal(6, 23, seed=seed), 9) for seed in (3, 4))
    M = (0.3 * V + 0.5 * corner + 0.1 * uniform(6, 23, seed=5)).double()
    R, U = ((W * (1 - mask) + (0 if gap is None else gap)) @ G for mask in (M, V.double()))
    return G, row_state(W, G.diagonal().clone(), M, R, U, V, torch.empty_like(W), 9, target_gap=gap)


@pytest.mark.parametrize("some_fixed", [False, True])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("group", [0, 7])
def test_lmo_is_the_first_of_the_best_vertices(group, positive, some_fixed):
    shape = (1, 14) if group else (2, 7)
    for seed, k in itertools.product(range(3), range(8)):
        # Some scores are equal, and some are zeros of either sign.
        score, fixed = (2 * normal(2, 7, seed=seed)).round(), uniform(2, 7, seed=seed) < 0.3 * some_fixed
        expected = []
        for worth in score.masked_fill(fixed, 1000.0).tolist():
            # combinations come in lexicographic order: the first of the best has its ties at the lowest indices.
            best = max(
                itertools.combinations(range(7), k), key=lambda chosen, worth=worth: sum(worth[j] for j in chosen)
            )
            expected.append([j in best and (worth[j] > 0 or not positive) for j in range(7)])
        for budget in (k, *([] if group else [torch.tensor([k, k], device=DEVICE)])):
            V = naive.lmo(score.view(shape), budget, group=group, fixed=fixed.view(shape), positive=positive)
            assert V.view(2, 7).tolist() == expected


@pytest.mark.parametrize("gap", [None, 0.3])
@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_a_step_ends_at_the_minimum_of_the_penalized_error(theta, gap):
    gap = None if gap is None else gap * normal(6, 23, seed=8).double()
    G, state = step_state(gap=gap)
    M, V = state.M.clone(), state.V.double()
    naive.row_step(state, theta=theta)

    def at(step):
        return error(state.W, G, M + step * (V - M), theta, 0.0 if gap is None else gap)

    grid = torch.stack([at(step) for step in torch.linspace(0, 1, 1001, dtype=torch.float64).tolist()])
    assert (at(state.eta[:, None]) <= grid.amin(0) * (1 + 1e-6)).all()
    torch.testing.assert_close(state.M, M + state.eta[:, None] * (V - M))
    E = state.W * (1 - state.M) + (0 if gap is None else gap)
    torch.testing.assert_close(state.R, E @ G)
    if gap is None:
        torch.testing.assert_close(state.error, error(state.W, G, state.M))


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_the_next_vertex_follows_the_slope_of_the_penalized_error(theta):
    G, state = step_state()
    naive.row_step(state, next_theta=theta)
    M = state.M.clone().requires_grad_()
    (slope,) = torch.autograd.grad(error(state.W, G, M, theta).sum(), M)
    assert torch.equal(state.V, naive.lmo(-slope, 9, positive=theta < 1))
    assert torch.equal(state.E, state.W * ~state.V)


def searched_pairs(w, G, v, fixed, group):
    """The change of a row's error by every searched swap (i, p), each from two errors by the definition."""

    def error_of(mask):
        e = w.masked_fill(mask, 0)
        return (e @ G @ e).item()

    def flipped(*columns):
        mask = v.clone()
        for j in columns:
            mask[j] = not mask[j]
        return error_of(mask)

    changes = {}
    for start in range(0, len(w), group or len(w)):
        members = range(start, start + (group or len(w)))
        kept, removed = [j for j in members if v[j] and not fixed[j]], [j for j in members if not v[j]]
        if kept and removed:
            best_i, best_p = min(kept, key=flipped), min(removed, key=flipped)
            for i, p in [(best_i, p) for p in removed] + [(i, best_p) for i in kept]:
                changes[i, p] = flipped(i, p) - error_of(v)
    return changes


@pytest.mark.parametrize("with_fixed", [False, True])
@pytest.mark.parametrize("group", [0, 5])
def test_swaps_are_the_best_of_all_searched_pairs(group, with_fixed):
    rows, d = 4, 20
    W, G = normal(rows, d).double(), gram(d).double()
    V = naive.lmo(normal(rows, d, seed=3), 2 if group else 8, group=group)
    fixed = naive.lmo(normal(rows, d, seed=5).masked_fill(~V, -torch.inf), 3) if with_fixed else torch.zeros_like(V)
    R = naive.product(W * ~V, G)
    for _ in range(12):
        before = V.clone()
        naive.row_swaps(W, G, R, V, 1, group=group, fixed=fixed if with_fixed else None)
        torch.testing.assert_close(R, (W * ~V) @ G)
        for row in range(rows):
            changes = searched_pairs(W[row], G, before[row], fixed[row], group)
            (i, p), change = min(changes.items(), key=lambda item: item[1])
            expected = before[row].clone()
            if change < 0:
                expected[i], expected[p] = False, True
            assert torch.equal(V[row], expected)
        if torch.equal(V, before):
            break
    else:
        pytest.fail("the search does not end")


@pytest.mark.parametrize("damp", [0.0, 0.2])
def test_the_bound_is_the_tangent_of_the_error(damp):
    """error(M) - <gradient, M - V>, by autograd, for a target other than W."""
    W, gap, M = normal(5, 17).double(), 0.3 * normal(5, 17, seed=3).double(), uniform(5, 17, seed=2).double()
    G, damping = gram(17).double(), damp * torch.arange(17, device=DEVICE).double()
    M.requires_grad_()
    value = error(W, G, M, gap=gap)
    (gradient,) = torch.autograd.grad(value.sum(), M)
    R = ((gap + W * (1 - M)) @ (G + damping.diag())).detach()
    score, constant = plain.bound_scores(W, R, M.detach(), target_gap=gap, damping=damping if damp else None)
    torch.testing.assert_close(score, -gradient / 2)
    V = naive.lmo(score, 6, positive=True)
    tangent = value.detach() - (gradient * (M.detach() - V.double())).sum(1)
    torch.testing.assert_close(plain.bound_sums(score, M.detach(), V) + constant, tangent)
