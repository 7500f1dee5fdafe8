"""The CPU backend against brute force, float64, finite differences, and the rounding of the specification."""

import itertools

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, garbage, gram, normal, uniform

from sparsefw.kernels import cpu, naive, topk_torch


def relaxed_error(W, M, G, theta=0.0):
    """error(M) + theta sum(q M (1 - M)), one number per row."""
    E = W * (1 - M)
    q = W * W * G.diagonal()
    return (E * (E @ G)).sum(1) + theta * (q * M * (1 - M)).sum(1)


def test_round_operand_to_bf16_and_not_at_all():
    X = normal(37, 131)
    assert torch.equal(cpu.round_operand(X, "bf16"), X.bfloat16().float())
    assert torch.equal(cpu.round_operand(X, "ieee"), X)
    assert cpu.round_operand(X.half(), "ieee").dtype == torch.float32


def test_round_operand_to_tf32_is_the_nearest_with_ties_to_even():
    ulp = 2.0**-10
    values = torch.tensor([1 + 0.4 * ulp, 1 + 0.5 * ulp, 1 + 0.6 * ulp, 1 + 1.5 * ulp, 2 - 0.1 * ulp, 0.0])
    expected = torch.tensor([1.0, 1.0, 1 + ulp, 1 + 2 * ulp, 2.0, 0.0])
    assert torch.equal(cpu.round_operand(values, "tf32"), expected)
    assert torch.equal(cpu.round_operand(-values, "tf32"), -expected)
    X = normal(37, 131)
    assert ((cpu.round_operand(X, "tf32") - X).abs() <= X.abs() * 2.0**-11).all()
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(cpu.round_operand(infinite, "tf32"), infinite)


def test_round_operand_to_two_tf32_numbers():
    X = normal(1000) * 10.0 ** (60 * uniform(1000) - 30)
    rounded = cpu.round_operand(X, "tf32x3")
    assert ((rounded - X).abs() <= X.abs() * 2.0**-22).all()
    assert (rounded != X).any()
    halves = X.bfloat16()
    assert torch.equal(cpu.round_operand(halves, "tf32x3"), halves.float())


@pytest.mark.parametrize("precision", cpu.PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_operand_gives_the_bits_of_naive(dtype, precision):
    X = normal(1000) * 10.0 ** (76 * uniform(1000) - 38)
    X[:5] = torch.tensor([0.0, 3.4e38, 1e-40, -3e-42, 2.0**-126])
    X = X.to(dtype)
    got, expected = (module.round_operand(X, precision) for module in (cpu, naive))
    # tf32x3 subtracts an infinity from itself.
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_round_operand_refuses_other_precisions():
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32x3, tf32, bf16, got 'fp8'"):
        cpu.round_operand(torch.zeros(1), "fp8")


@pytest.mark.parametrize(("precision", "bits"), [("ieee", 20), ("tf32", 10), ("bf16", 7)])
def test_product_and_gradient_against_float64(precision, bits):
    W, M, G = normal(37, 131), uniform(37, 131), gram(131)
    out = garbage(37, 131)
    assert cpu.product(W, G, precision=precision, out=out) is out
    bound = 2.0**-bits * (W.double().abs() @ G.double().abs())
    assert ((out - W.double() @ G.double()).abs() <= bound).all()
    E = W.double() * (1 - M.double())
    bound = 2.0**-bits * 2 * W.double().abs() * (E.abs() @ G.double().abs())
    got = cpu.gradient(W, M, G, precision=precision)
    assert ((got + 2 * W.double() * (E @ G.double())).abs() <= 2 * bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_against_float64(dtype):
    X, G = normal(200, 131, dtype=dtype), gram(131)
    expected = G.double() + X.double().T @ X.double()
    assert cpu.gram_accumulate(G, X) is G
    assert ((G - expected).tril().abs() <= 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_against_float64(dtype):
    D, X, B = normal(200, 37, dtype=dtype), normal(200, 131, seed=1, dtype=dtype), normal(37, 131, seed=2)
    expected = B.double() + D.double().T @ X.double()
    assert cpu.cross_accumulate(B, D, X) is B
    assert ((B - expected).abs() <= 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("group", [0, 7])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_lmo_is_the_best_of_all_vertices(positive, as_tensor, group):
    for seed, k in itertools.product(range(3), range(8)):
        score = (2 * normal(1, 7, seed=seed)).round()
        # combinations come in lexicographic order: the first of the best has its ties at the lowest indices.
        best = max(itertools.combinations(range(7), k), key=lambda chosen: sum(score[0, list(chosen)].tolist()))
        best = [j for j in best if score[0, j] > 0 or not positive]
        budget = torch.tensor([k], device=DEVICE) if as_tensor and not group else k
        assert cpu.lmo(score, budget, group=group, positive=positive)[0].nonzero().flatten().tolist() == best


@pytest.mark.parametrize("group", [0, 4])
def test_lmo_keeps_fixed_entries_and_ties_by_index(group):
    score = torch.tensor([[1.0, 1.0, -0.0, 0.0, 3.0, 3.0, 3.0, -torch.inf]], device=DEVICE)
    fixed = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 1]], device=DEVICE, dtype=torch.bool)
    V = cpu.lmo(score, 2 if group else 4, group=group, fixed=fixed)
    assert V[0].nonzero().flatten().tolist() == ([0, 3, 4, 7] if group else [3, 4, 5, 7])


@pytest.mark.parametrize("k", [-1, 5])
def test_lmo_refuses_impossible_budgets_and_nan(k):
    with pytest.raises(ValueError, match="k: expected 0 to 4"):
        cpu.lmo(torch.zeros(1, 4), k)
    with pytest.raises(ValueError, match="score: NaN"):
        cpu.lmo(torch.tensor([[0.0, torch.nan]]), 1)
    with pytest.raises(ValueError, match="group: expected a divisor"):
        cpu.lmo(torch.zeros(1, 4), 1, group=3)


def test_lmo_of_no_rows_and_into_out():
    assert cpu.lmo(torch.empty(0, 7, device=DEVICE), 3).shape == (0, 7)
    score, out = normal(5, 7), garbage(5, 7, dtype=torch.bool)
    assert cpu.lmo(score, 3, out=out) is out
    assert (out.sum(1) == 3).all()


def test_update_reaches_the_vertex_exactly_and_stays_in_the_polytope():
    M, V, R, U = uniform(37, 131), uniform(37, 131, seed=1) < 0.5, normal(37, 131), normal(37, 131, seed=1)
    for eta in (0.3, 0.999, 1.0):
        cpu.convex_update(M, V, R, U, torch.full((37,), eta, device=DEVICE))
        assert ((M >= 0) & (M <= 1)).all()
    assert torch.equal(M, V.float())


def step_state(rows=6, d=23, k=9):
    W, G = normal(rows, d), gram(d)
    M, V = 0.5 * cpu.lmo(normal(rows, d, seed=2), k) + 0.25, cpu.lmo(normal(rows, d, seed=3), k)
    return W, G, dict(
        W=W, diag=G.diagonal().clone(), M=M, R=(W * (1 - M)) @ G, U=(W * ~V) @ G, V=V, E=torch.empty_like(W)
    )  # fmt: skip


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_of_rows_change_nothing(per_row, group, monkeypatch):
    k = 2 if group else torch.arange(37, device=DEVICE) % 25 if per_row else 9
    fixed = cpu.lmo(normal(37, 24, seed=5), 0 if per_row else 1, group=group)
    outcomes = []
    for block in (1 << 20, 100):
        monkeypatch.setattr(topk_torch, "BLOCK", block)
        _, _, state = step_state(37, 24)
        numbers = cpu.row_step(**state, k=k, group=group, fixed=fixed, theta=0.4, next_theta=1.0)
        outcomes.append([*numbers, *(state[name] for name in "MRVE")])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert DEVICE != "cpu" or len(topk_torch.row_blocks(state["M"])) > 1


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_line_search_finds_the_best_step(theta):
    W, G, state = step_state()
    M, V = state["M"].double(), state["V"].double()
    eta, error = cpu.row_step(**state, k=9, theta=theta)

    def at(step):
        return relaxed_error(W.double(), M + step * (V - M), G.double(), theta)

    grid = torch.stack([at(step) for step in torch.linspace(0, 1, 1001, dtype=torch.float64).tolist()])
    reached = at(eta.double()[:, None])
    assert (reached <= grid.min(0).values * (1 + 1e-6)).all()
    plain = relaxed_error(W.double(), state["M"].double(), G.double())
    assert torch.allclose(error.double(), plain, rtol=1e-4)


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_the_next_vertex_follows_the_slope_of_the_penalized_error(theta):
    W, G, state = step_state()
    cpu.row_step(**state, k=9, next_theta=theta)
    M, h = state["M"].double(), 1e-5
    slope = torch.empty_like(M)
    for j in range(M.shape[1]):
        ahead, behind = M.clone(), M.clone()
        ahead[:, j] += h
        behind[:, j] -= h
        slope[:, j] = relaxed_error(W.double(), ahead, G.double(), theta)
        slope[:, j] -= relaxed_error(W.double(), behind, G.double(), theta)
    assert torch.equal(state["V"], cpu.lmo(-slope.float(), 9, positive=theta < 1))
    assert torch.equal(state["E"], W.masked_fill(state["V"], 0))


def test_open_loop_takes_the_step_it_is_given():
    _, _, state = step_state()
    M, V, R, U = (state[name].clone() for name in ("M", "V", "R", "U"))
    eta, _ = cpu.row_step(**state, k=9, eta=0.25)
    assert (eta == 0.25).all()
    assert torch.allclose(state["M"], 0.75 * M + 0.25 * V)
    assert torch.allclose(state["R"], 0.75 * R + 0.25 * U)
