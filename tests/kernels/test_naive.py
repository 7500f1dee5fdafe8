"""The specification itself: against definitions, exhaustive search and torch's solvers, in float64."""

import itertools

import pytest
import torch
from helpers.kernel_inputs import DEVICE, garbage, gram, normal, uniform

from sparsefw.kernels import naive, naive_fits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def error(W, G, M, theta=0.0, gap=0.0):
    """The error (rows,) of a relaxed mask, with the integrality penalty, from its definition."""
    E = gap + W * (1 - M)
    return (E * (E @ G)).sum(1) + theta * (W**2 * G.diagonal() * M * (1 - M)).sum(1)


def step_state(rows=6, d=23, k=9, group=0, gap=None):
    """G, and arguments of a step in the middle of a solve, float64."""
    W, G = normal(rows, d).double(), gram(d).double()
    V, corner = (naive.lmo(normal(rows, d, seed=seed), k, group=group) for seed in (3, 4))
    M = 0.3 * V + 0.5 * corner + 0.1 * uniform(rows, d, seed=5)
    state = dict(W=W, diag=G.diagonal().clone(), M=M.double(), V=V, E=torch.empty_like(W))
    for name, mask in dict(R=state["M"], U=V.double()).items():
        state[name] = (W * (1 - mask) + (0 if gap is None else gap)) @ G
    return G, state


@pytest.mark.parametrize("dtype", DTYPES)
def test_ieee_operands_are_not_rounded(dtype):
    X = normal(37, 131, dtype=dtype)
    rounded = naive.round_operand(X, "ieee")
    assert rounded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(rounded.double(), X.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("precision", "bits"), [("tf32", 10), ("bf16", 7)])
def test_operands_are_the_nearest_numbers_with_ties_to_even(precision, bits, dtype):
    ulp = 2.0**-bits
    X = torch.tensor([1 + 0.4 * ulp, 1 + 0.5 * ulp, 1 + 0.6 * ulp, 1 + 1.5 * ulp, 2 - 0.1 * ulp, 0.0, torch.inf])
    expected = torch.tensor([1.0, 1.0, 1 + ulp, 1 + 2 * ulp, 2.0, 0.0, torch.inf])
    for sign in (1, -1):
        assert torch.equal(naive.round_operand(sign * X.to(dtype), precision), sign * expected.to(dtype))


def test_two_tf32_numbers_hold_two_times_eleven_bits():
    X = normal(1000) * 10.0 ** (60 * uniform(1000) - 30)
    rounded = naive.round_operand(X, "tf32x3")
    assert ((rounded - X).abs() <= X.abs() * 2.0**-22).all()
    assert (rounded != X).any()


def test_round_operand_refuses_other_precisions():
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32x3, tf32, bf16, got 'fp8'"):
        naive.round_operand(torch.zeros(1), "fp8")


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_a_sum_over_columns(dtype, precision):
    E, G = normal(5, 7, dtype=dtype), gram(7).to(dtype)
    out = garbage(5, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert naive.product(E, G, precision=precision, out=out) is out
    E, G = (naive.round_operand(X, precision).double() for X in (E, G))
    expected = (E[:, :, None] * G[None]).sum(1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_gradient_is_the_derivative_of_the_error():
    W, G = normal(3, 17).double(), gram(17).double()
    M = uniform(3, 17).double().requires_grad_()
    (expected,) = torch.autograd.grad(error(W, G, M).sum(), M)
    torch.testing.assert_close(naive.gradient(W, M.detach(), G), expected)


def test_accumulations_add_one_token_after_another():
    X, D = normal(20, 7).double(), normal(20, 5, seed=1).double()
    G, B = gram(7).double(), normal(5, 7, seed=2).double()
    expected_G, expected_B = G.clone(), B.clone()
    for x, y in zip(X, D, strict=True):
        expected_G += x.outer(x)
        expected_B += y.outer(x)
    assert naive.gram_accumulate(G, X) is G
    assert naive.cross_accumulate(B, D, X) is B
    torch.testing.assert_close(G.tril(), expected_G.tril())
    torch.testing.assert_close(B, expected_B)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("group", [0, 7])
def test_lmo_is_the_first_of_the_best_vertices(group, positive, as_tensor, dtype):
    for seed, k in itertools.product(range(3), range(8)):
        score = (2 * normal(1, 7, seed=seed)).round().to(dtype)
        # combinations come in lexicographic order: the first of the best has its ties at the lowest indices.
        best = max(itertools.combinations(range(7), k), key=lambda chosen: sum(score[0, list(chosen)].tolist()))
        best = [j for j in best if score[0, j] > 0 or not positive]
        budget = torch.tensor([k], device=DEVICE) if as_tensor and not group else k
        assert naive.lmo(score, budget, group=group, positive=positive)[0].nonzero().flatten().tolist() == best


def test_lmo_chooses_in_every_group_and_row_for_itself():
    score = normal(5, 24).round()
    groups = naive.lmo(score, 2, group=4)
    for row, start in itertools.product(range(5), range(0, 24, 4)):
        part = slice(start, start + 4)
        assert torch.equal(groups[row, part], naive.lmo(score[row : row + 1, part], 2)[0])
    k = torch.tensor([0, 3, 24, 5, 1], device=DEVICE)
    rows = naive.lmo(score, k)
    for row in range(5):
        assert torch.equal(rows[row], naive.lmo(score[row : row + 1], int(k[row]))[0])


@pytest.mark.parametrize("group", [0, 4])
def test_lmo_keeps_fixed_entries_and_gives_ties_to_the_lower_index(group):
    score = torch.tensor([[1.0, 1.0, -0.0, 0.0, 3.0, 3.0, 3.0, -torch.inf]], device=DEVICE)
    fixed = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 1]], device=DEVICE, dtype=torch.bool)
    for positive in (False, True):
        V = naive.lmo(score, 2 if group else 4, group=group, fixed=fixed, positive=positive)
        assert V[0].nonzero().flatten().tolist() == ([0, 3, 4, 7] if group else [3, 4, 5, 7])
    assert naive.lmo(score[:, 2:4], 1).tolist() == [[True, False]]


def test_lmo_gives_ties_of_a_long_row_to_the_lower_index():
    score = torch.ones(2, 1000, device=DEVICE)
    score[1, 900:] = 2
    V = naive.lmo(score, 170)
    assert V[0].nonzero().flatten().tolist() == list(range(170))
    assert V[1].nonzero().flatten().tolist() == [*range(70), *range(900, 1000)]


def test_lmo_refuses_impossible_budgets_and_nan():
    for k in (-1, 5):
        with pytest.raises(ValueError, match="k: expected 0 to 4"):
            naive.lmo(torch.zeros(1, 4), k)
    with pytest.raises(ValueError, match="k: expected an int"):
        naive.lmo(torch.zeros(2, 4), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="group: expected a divisor"):
        naive.lmo(torch.zeros(1, 4), 1, group=3)
    with pytest.raises(ValueError, match="score: NaN"):
        naive.lmo(torch.tensor([[0.0, torch.nan]]), 1)
    assert naive.lmo(torch.empty(0, 7), 3).shape == (0, 7)


def test_update_moves_along_the_line():
    M, R, U = uniform(5, 7).double(), normal(5, 7).double(), normal(5, 7, seed=1).double()
    V = uniform(5, 7, seed=1) < 0.5
    eta = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64, device=DEVICE)
    weight = eta.unsqueeze(1).expand(5, 7)
    expected_M, expected_R = M.lerp(V.double(), weight), R.lerp(U, weight)
    naive.convex_update(M, V, R, U, eta)
    torch.testing.assert_close(M, expected_M)
    torch.testing.assert_close(R, expected_R)


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_step_size_is_the_best_of_a_grid(theta):
    G, state = step_state()
    W, M, V = (state[name].double().clone() for name in ("W", "M", "V"))
    eta, at_end = naive.row_step(**state, k=9, theta=theta)
    steps = torch.linspace(0, 1, 1001, dtype=torch.float64).tolist()
    grid = torch.stack([error(W, G, M + step * (V - M), theta) for step in steps])
    reached = error(W, G, M + eta[:, None] * (V - M), theta)
    assert (reached <= grid.min(0).values * (1 + 1e-12)).all()
    assert ((eta - grid.argmin(0) / 1000).abs() <= 1e-3).all()
    torch.testing.assert_close(state["M"], M + eta[:, None] * (V - M))
    torch.testing.assert_close(at_end, error(W, G, state["M"]))


def test_step_size_where_the_error_is_concave():
    """With the penalty alone, the step goes to the better end of the line."""
    _, state = step_state(rows=4)
    for name, ends in dict(M=[0.9, 0.1, 0.4, 0.6], W=[1.0] * 4).items():
        state[name][:] = torch.tensor(ends, device=DEVICE)[:, None]
    state["R"].zero_()
    state["U"].zero_()
    state["V"].fill_(True)
    # theta q m (1 - m) is 0 at the vertex, m = 1, which is never worse than the present M.
    eta, _ = naive.row_step(**state, k=9, theta=1.0)
    assert eta.tolist() == [1.0] * 4
    state["M"].fill_(1.0)
    state["V"].fill_(False)
    state["diag"].zero_()
    eta, _ = naive.row_step(**state, k=9, theta=1.0)
    assert eta.tolist() == [0.0] * 4


@pytest.mark.parametrize("with_gap", [False, True])
@pytest.mark.parametrize("group", [0, 4])
def test_products_follow_the_state_from_step_to_step(group, with_gap):
    """R stays the product of M and the error that of its definition, though only the products of E are made."""
    gap = normal(6, 24, seed=8).double() if with_gap else None
    k = 2 if group else 9
    fixed = naive.lmo(normal(6, 24, seed=9), 1, group=group)
    G, state = step_state(d=24, k=k, group=group, gap=gap)
    for theta in (0.0, 0.3, 0.6, 1.0):
        options = dict(group=group, fixed=fixed, target_gap=gap, theta=theta, next_theta=min(1.0, theta + 0.3))
        _, at_end = naive.row_step(**state, k=k, **options)
        state["U"].copy_(naive.product(state["E"], G))
        removed = state["W"] * (1 - state["M"])
        torch.testing.assert_close(state["R"], (removed + (0 if gap is None else gap)) @ G)
        torch.testing.assert_close(at_end, (removed * state["R"]).sum(1))
        assert torch.equal(state["E"], state["W"] * ~state["V"] + (0 if gap is None else gap))
        assert (state["V"] | ~fixed).all()
    # The last choice was made at next_theta = 1.
    assert (state["V"].view(-1, group or 24).sum(1) == k).all()


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_the_next_vertex_follows_the_slope_of_the_penalized_error(theta):
    G, state = step_state()
    naive.row_step(**state, k=9, next_theta=theta)
    M = state["M"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(error(state["W"], G, M, theta).sum(), M)
    assert torch.equal(state["V"], naive.lmo(-slope, 9, positive=theta < 1))


def test_open_loop_takes_the_step_it_is_given():
    _, state = step_state()
    M, V, R, U = (state[name].clone() for name in ("M", "V", "R", "U"))
    out = garbage(6, dtype=torch.float64), garbage(6, dtype=torch.float64)
    assert naive.row_step(**state, k=9, eta=0.25, out=out)[0] is out[0]
    assert (out[0] == 0.25).all()
    torch.testing.assert_close(state["M"], 0.75 * M + 0.25 * V)
    torch.testing.assert_close(state["R"], 0.75 * R + 0.25 * U)


@pytest.mark.parametrize("masked", [False, True])
def test_conjugate_steps_solve_the_normal_equations(masked):
    """After enough steps, Z is torch's solution of B - Z G = 0 on the entries that move."""
    rows, d = 5, 12
    G, B = gram(d).double() / 300, normal(rows, d, seed=1).double()
    mask = uniform(rows, d, seed=2) < 0.5 if masked else None
    Z = torch.zeros_like(B)
    state = {name: garbage(rows, d, dtype=torch.float64) for name in ("P", "U")}
    state |= {name: garbage(rows, dtype=torch.float64) for name in ("rz", "enough")}
    state |= dict(Z=Z, R=B.clone(), mask=mask, inverse=1 / G.diagonal())
    naive_fits.conjugate_step(**state, first=True)
    for step in range(2 * d):
        state["U"].copy_(state["P"] @ G)
        naive_fits.conjugate_step(**state, last=step == 2 * d - 1)
    torch.testing.assert_close(state["R"], B - Z @ G)
    for row in range(rows):
        free = torch.ones(d, dtype=torch.bool) if mask is None else mask[row].cpu()
        solution = torch.linalg.solve(G[free][:, free], B[row, free])
        # A row stops at CONVERGED of its first <r, z>, which is a millionth of its residual.
        torch.testing.assert_close(Z[row, free], solution, rtol=1e-4, atol=1e-5)
        assert not Z[row, ~free].any()


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
@pytest.mark.parametrize("group", [0, 4, 5])
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
    assert (V | ~fixed).all()


def test_a_search_makes_as_many_swaps_as_it_may():
    W, G = normal(4, 20).double(), gram(20).double()
    V = naive.lmo(normal(4, 20, seed=3), 8)
    R = naive.product(W * ~V, G)
    at_once = R.clone(), V.clone()
    naive.row_swaps(W, G, *at_once, 3)
    for _ in range(3):
        naive.row_swaps(W, G, R, V, 1)
    assert torch.equal(at_once[1], V)
    torch.testing.assert_close(at_once[0], R)


def test_repeat_gives_every_row_of_numbers_to_the_step():
    seen = []
    for _ in naive.repeat(lambda *numbers: seen.append(numbers), [(1, 2.5), (3, 4.5)], torch.empty(1)):
        assert len(seen) in (1, 2)
    assert seen == [(1, 2.5), (3, 4.5)]
