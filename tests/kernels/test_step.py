"""row_step against the specification in float64, and against the definition of each of its parts."""

import counts
import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, assert_near, garbage, gram, hard_scores, in_float64, normal
from helpers.problems import make_problem, on_gpu
from torch.utils._pytree import tree_map_only

from sparsefw.kernels import cpu, naive, topk, triton_ops
from sparsefw.kernels import step as step_module
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.launch import INTERPRET
from sparsefw.kernels.step import row_step
from sparsefw.solver import frank_wolfe


@pytest.fixture(params=["cpu", "one chunk", "chunks"])
def backend(request, monkeypatch):
    """cpu.py; the Triton kernel with rows in one chunk; with chunks of 64 columns and 128 keys in registers."""
    if request.param == "chunks":

        def configuration(rows: int, d: int, group: int) -> dict[str, int]:
            return dict(BLOCK_R=32, BLOCK_D=64, SEARCH_D=128)

        monkeypatch.setattr(step_module, "configuration", configuration)
    return cpu if request.param == "cpu" else triton_ops


def solver_state(rows: int, d: int, k, group: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of a step in the middle of a solve: M inside the polytope, R and U its products, V a vertex."""
    W, G = normal(rows, d, dtype=dtype), gram(d)
    V = naive.lmo(normal(rows, d, seed=3), k, group=group)
    M = 0.3 * V + 0.7 * naive.lmo(normal(rows, d, seed=4), k, group=group)
    weight = W.float()
    return dict(
        W=W, diag=G.diagonal().contiguous(), M=M, R=(weight * (1 - M)) @ G, U=(weight * ~V) @ G, V=V,
        E=garbage(rows, d, dtype=dtype),
    )  # fmt: skip


def copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def rounding_of_step(state, theta=0.0):
    """The change of each row's step size, to first order, by one fp32 rounding of every term of its two sums."""
    W, diag, M, R, U, V = (state[name].double() for name in ("W", "diag", "M", "R", "U", "V"))
    q, D = W * W * diag, V - M
    eta, _ = naive.row_step(**in_float64(state), k=0, theta=theta)
    lin = (D * (-2 * W * R + theta * q * (1 - 2 * M))).abs().sum(1)
    quad, terms = (W * D * (R - U) - theta * q * D * D).sum(1), (W * D * (R - U)).abs() + theta * q * D * D
    # 0 / 0 where the vertex equals M: there is nothing to round.
    return 2.0**-24 * ((lin + 2 * eta * terms.sum(1)) / (2 * quad).abs()).nan_to_num(posinf=torch.inf)


def check_step(backend, state, k, **options):
    """Compare floats with naive in float64, and the vertex with the LMO of the state that the step left."""
    plain, start, truth = copy(state), copy(state), in_float64(state)
    gap = options.get("target_gap", torch.zeros_like(state["M"]))
    options_in_float64 = options | {"target_gap": gap.double()}
    eta_truth, error_truth = naive.row_step(**truth, k=k, **options_in_float64)
    eta_plain, error_plain = naive.row_step(**plain, k=k, **options)
    eta, error = backend.row_step(**state, k=k, **options)
    # What a step that is longer by its rounding makes of M and R.
    beside = dict.fromkeys(("M", "R"), 0.0)
    if options.get("eta") is None:
        # Sums nearly cancel, more in some rows than in others, so plain fp32's worst row says little about other rows.
        allowed = 4 * rounding_of_step(start, options.get("theta", 0.0))
        assert ((eta - eta_truth).abs() <= allowed).all()
        assert ((eta_plain - eta_truth).abs() <= allowed).all()
        longer = ((eta - eta_truth).abs() / eta_truth.clamp(min=1e-9))[:, None]
        beside = {name: longer * (truth[name] - start[name].double()).abs() for name in beside}
    else:
        assert_near(eta, eta_plain, eta_truth)
    for name in ("M", "R"):
        assert_near(state[name], plain[name], truth[name], beside[name])
    assert_near(error, error_plain, error_truth)
    next_theta = options.get("next_theta", 0.0)
    W, M = state["W"].double(), state["M"].double()
    score = 2 * W * state["R"].double() - next_theta * W * W * state["diag"].double() * (1 - 2 * M)
    selection = {name: options[name] for name in ("group", "fixed") if name in options}
    # Scores that differ by less than their rounding may swap, so the float64 choice is compared by its worst score.
    V = naive.lmo(score.float(), k, positive=next_theta < 1, **selection)
    swapped = state["V"] != V
    assert swapped.sum() <= 2 + V.numel() // 10000
    assert torch.equal(V.sum(1), state["V"].sum(1))
    assert torch.equal(state["E"], (gap + start["W"].masked_fill(state["V"], 0)).to(state["E"].dtype))
    return eta, error


@pytest.mark.slow
@pytest.mark.parametrize(("theta", "next_theta"), [(0.0, 0.0), (0.0, 0.3), (0.4, 0.6), (1.0, 1.0)])
@pytest.mark.parametrize("eta", [None, 0.25])
def test_step_by_rows(backend, eta, theta, next_theta):
    check_step(backend, solver_state(37, 262, 100), 100, eta=eta, theta=theta, next_theta=next_theta)


@pytest.mark.slow
@pytest.mark.parametrize("next_theta", [0.6, 1.0])
@pytest.mark.parametrize("eta", [None, 0.25])
def test_numbers_may_be_read_when_the_step_runs(backend, eta, next_theta):
    given, stored = (solver_state(37, 262, 100) for _ in range(2))
    numbers = dict(theta=0.4, next_theta=next_theta) | ({} if eta is None else dict(eta=eta))
    numbers_of_step = backend.row_step(**given, k=100, **numbers)
    tensors = {name: torch.tensor(number, device=DEVICE) for name, number in numbers.items()}
    out = garbage(37), garbage(37)
    written = backend.row_step(**stored, k=100, **tensors, out=out)
    assert all(a is b for a, b in zip(written, out, strict=True))
    for a, b in zip((*numbers_of_step, *given.values()), (*out, *stored.values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "d", "k"), [(1, 1, 0), (1, 1, 1), (1, 131, 50), (5, 131, 0), (5, 131, 131)])
def test_step_of_odd_shapes(backend, rows, d, k):
    check_step(backend, solver_state(rows, d, k), k, next_theta=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_of_every_dtype(backend, dtype):
    check_step(backend, solver_state(20, 131, 50, dtype=dtype), 50, theta=0.2, next_theta=0.4)


def test_the_removed_weights_are_rounded_to_nearest(backend):
    state = solver_state(20, 131, 50)
    state["E"] = garbage(20, 131, dtype=torch.bfloat16)
    check_step(backend, state, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 4])
def test_what_the_weights_lack_is_removed_too(backend, group, dtype):
    k = 2 if group else 50
    state, target_gap = solver_state(37, 132, k, group), normal(37, 132, seed=8)
    state["E"] = garbage(37, 132, dtype=dtype)
    check_step(backend, state, k, group=group, target_gap=target_gap, theta=0.2, next_theta=0.4)


@pytest.mark.parametrize("next_theta", [0.5, 1.0])
def test_step_with_a_budget_per_row(backend, next_theta):
    k = torch.randint(0, 132, (37,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_step(backend, solver_state(37, 131, k), k, next_theta=next_theta)


@pytest.mark.parametrize("next_theta", [0.5, 1.0])
@pytest.mark.parametrize("group", [0, 4])
def test_step_keeps_the_fixed_entries(backend, group, next_theta):
    k = 2 if group else 60
    state = solver_state(37, 132, k, group)
    fixed = naive.lmo(normal(37, 132, seed=9), k // 2, group=group)
    check_step(backend, state, k, group=group, fixed=fixed, next_theta=next_theta)
    assert (state["V"] | ~fixed).all()


@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 5), (16, 32)])
def test_step_by_groups(backend, n, m, theta):
    check_step(backend, solver_state(20, 6 * m, n, m), n, group=m, theta=theta, next_theta=theta)


def test_ties_go_to_the_lower_index(backend):
    state = solver_state(3, 131, 40)
    for name, value in dict(W=1.0, diag=1.0, M=0.5, R=1.0, U=1.0).items():
        state[name].fill_(value)
    backend.row_step(**state, k=40)
    assert torch.equal(state["V"], torch.arange(131, device=DEVICE).expand(3, 131) < 40)


def test_only_positive_scores_are_taken_before_the_penalty_is_full(backend):
    state = solver_state(3, 131, 40)
    state["R"] = -state["W"]
    state["U"] = -state["W"]
    backend.row_step(**copy(state), k=40, next_theta=1.0)
    backend.row_step(**state, k=40)
    assert not state["V"].any()


def test_a_nan_shows_in_the_error_of_its_row(backend):
    state = solver_state(3, 131, 40)
    state["U"][1, 7] = torch.nan
    _, error = backend.row_step(**state, k=40)
    assert error.isnan().tolist() == [False, True, False]


@pytest.mark.slow
def test_step_repeats_bit_by_bit(backend):
    once, again = (solver_state(37, 131, 50) for _ in range(2))
    results = [backend.row_step(**state, k=50, theta=0.3, next_theta=0.4) for state in (once, again)]
    for a, b in zip((*results[0], *once.values()), (*results[1], *again.values()), strict=True):
        assert torch.equal(a, b)


def test_step_does_not_depend_on_the_other_rows(backend):
    whole = solver_state(37, 131, 50)
    part = {name: tensor.clone() if name == "diag" else tensor[:5].clone() for name, tensor in whole.items()}
    backend.row_step(**whole, k=50, next_theta=0.4)
    backend.row_step(**part, k=50, next_theta=0.4)
    for name in ("M", "R", "V", "E"):
        assert torch.equal(whole[name][:5], part[name])


def test_step_of_the_longest_row():
    state = solver_state(1, 131, 50)
    for name, tensor in state.items():
        state[name] = tensor.repeat(501) if name == "diag" else tensor.repeat(1, 501)
        state[name] = state[name][..., :65536].contiguous()
    check_step(triton_ops, state, 30000, theta=0.2, next_theta=0.4)


def test_step_of_one_row_a_program(monkeypatch):
    """Compiled kernels have such tiles, and no mask of rows; the interpreter takes many rows at once."""
    monkeypatch.setattr(step_module, "configuration", lambda *_: dict(BLOCK_R=1, BLOCK_D=256, SEARCH_D=256))
    check_step(triton_ops, solver_state(5, 131, 50), 50, theta=0.2, next_theta=0.4)
    check_step(triton_ops, solver_state(5, 256, 100), 100, theta=0.2, next_theta=0.4)
    check_step(triton_ops, solver_state(5, 132, 2, 4), 2, group=4, theta=0.2, next_theta=0.4)


def test_step_of_row_slices(backend):
    state, expected = solver_state(20, 131, 50), solver_state(20, 131, 50)
    wide = {
        name: tensor if name == "diag" else torch.cat((tensor, tensor), 1)[:, 131:] for name, tensor in state.items()
    }
    backend.row_step(**wide, k=50)
    backend.row_step(**expected, k=50)
    assert torch.equal(wide["V"], expected["V"])
    assert torch.equal(wide["R"], expected["R"])


def test_step_of_no_rows(backend):
    state = {name: t if name == "diag" else t[:0] for name, t in solver_state(3, 131, 50).items()}
    eta, error = backend.row_step(**state, k=50)
    assert eta.shape == error.shape == (0,)


def state_of_scores(score: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a step that does not move (eta = 0) and whose next scores are `score`, finite numbers."""
    half, zeros = torch.full_like(score, 0.5), torch.zeros_like(score)
    return dict(
        W=half, diag=zeros[0].clone(), M=zeros, R=score.clone(), U=score.clone(), V=zeros.bool(),
        E=garbage(*score.shape), eta=0.0,
    )  # fmt: skip


def finite_scores(rows: int, d: int) -> dict[str, torch.Tensor]:
    """Hard scores for the search, and rows of ties."""
    tied = dict(equal=torch.ones(rows, d), zeros=torch.zeros(rows, d), few=(2 * normal(rows, d)).round().cpu())
    tied["denormal"] = (normal(rows, d) * 8).round().cpu() * 2.0**-148
    tied["signed zeros"] = torch.zeros(rows, d).copysign(normal(rows, d).cpu())
    scores = hard_scores(rows, d) | {name: score.to(DEVICE) for name, score in tied.items()}
    return {name: score.clamp(-3e38, 3e38) for name, score in scores.items()}


STARTS = (0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 3e38, -3e38, torch.inf, -torch.inf, torch.nan, 1e-3, 1e30)


@pytest.mark.slow
@pytest.mark.parametrize("next_theta", [0.0, 1.0])
@pytest.mark.parametrize("name", finite_scores(1, 1))
def test_a_search_may_start_from_any_threshold(backend, name, next_theta):
    # A row for every start with every second budget: next to each other, the two theta have all pairs.
    pairs = [(k, start) for k in (0, 1, 2, 80, 199, 200) for start in STARTS][int(next_theta) :: 2]
    k = torch.tensor([k for k, _ in pairs], device=DEVICE)
    threshold = torch.tensor([start for _, start in pairs], device=DEVICE)
    score = finite_scores(len(pairs), 200)[name]
    V = naive.lmo(score, k, positive=next_theta < 1)
    # The second search starts where the first one ended.
    for _ in range(2):
        state = state_of_scores(score)
        backend.row_step(**state, k=k, next_theta=next_theta, threshold=threshold)
        assert torch.equal(state["V"], V)


@pytest.mark.slow
def test_a_search_may_start_from_any_bits(backend):
    starts = torch.randint(-(2**31), 2**31, (64,), generator=torch.Generator().manual_seed(1))
    k = torch.randint(0, 132, (64,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for score in (normal(64, 131), normal(64, 131).exp(), hard_scores(64, 131)["any bits"].clamp(-3e38, 3e38)):
        for next_theta in (0.0, 1.0):
            state, threshold = state_of_scores(score), starts.to(torch.int32).view(torch.float32).to(DEVICE)
            backend.row_step(**state, k=k, next_theta=next_theta, threshold=threshold)
            assert torch.equal(state["V"], naive.lmo(score, k, positive=next_theta < 1))


def test_a_threshold_changes_no_bit_of_a_step(backend):
    for group, fixed in ((0, False), (0, True), (4, False)):
        k = 2 if group else 60
        start = solver_state(37, 132, k, group)
        options = dict(group=group, fixed=naive.lmo(normal(37, 132, seed=9), 20) if fixed else None)
        state, threshold = copy(start), normal(37)
        numbers = backend.row_step(**start, k=k, next_theta=0.6, **options)
        again = backend.row_step(**state, k=k, next_theta=0.6, threshold=threshold, **options)
        for name in ("M", "R", "V", "E"):
            assert torch.equal(start[name], state[name])
        assert all(torch.equal(a, b) for a, b in zip(numbers, again, strict=True))
        if group:
            assert torch.equal(threshold, normal(37))


def test_a_nan_ends_a_search_from_any_threshold(backend):
    for number, name in ((1, "one"), (60, "as many as are kept"), (131, "all")):
        state, threshold = state_of_scores(normal(len(STARTS), 131)), torch.tensor(STARTS, device=DEVICE)
        state["R"][:, :number] = torch.nan
        _, error = backend.row_step(**state, k=60, next_theta=1.0, threshold=threshold)
        assert error.isnan().all(), name


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="calls are counted in the interpreter, which runs where no GPU is")
@pytest.mark.parametrize("name", finite_scores(1, 1))
def test_a_search_from_a_threshold_takes_as_many_passes_as_are_said_and_never_many(name, monkeypatch):
    """The passes are those of bench/counts.py, which searches each row alone."""
    score, calls = finite_scores(1, 4000)[name], []
    for function in ("count_reaching", "highest_below"):
        counted = getattr(topk, function)
        monkeypatch.setattr(topk, function, lambda *args, counted=counted: calls.append(1) or counted(*args))
    for n, k in enumerate((1, 20, 1600, 3998)):
        # With every k two of the starts or three: each start stands with half of the k.
        for start in (-torch.inf, 0.0, 2.0**-149, 1.0, torch.inf)[n % 2 :: 2]:
            calls.clear()
            threshold = torch.full((1,), start)
            row_step(**state_of_scores(score), k=k, next_theta=1.0, threshold=threshold)
            first = counts.order_key(torch.tensor([start]))
            passes, T = counts.from_threshold(counts.order_key(score), k, first, positive=False)
            assert len(calls) == passes.item() <= 50
            assert torch.equal(counts.order_key(threshold), counts.order_key(counts.key_score(T)))
        # A threshold that separates the scores once separates them again.
        calls.clear()
        row_step(**state_of_scores(score), k=k, next_theta=1.0, threshold=threshold)
        assert len(calls) == 1 or (score >= threshold).sum() != k


def test_a_solve_carries_thresholds_from_step_to_step():
    problem, last = make_problem(9, 40), None
    problem = problem if DEVICE == "cpu" else on_gpu(problem)
    options = dict(steps=10, step_rule="line-search", penalty=1.0, backend=Backend(triton_ops))
    for t, state in enumerate(frank_wolfe.iterate(problem, **options), 1):
        theta = min(1.0, t / (frank_wolfe.RAMP * 10))
        M, q = state.M, problem.W**2 * problem.G.diagonal()
        score = 2 * problem.W * state.R - theta * q * (1 - 2 * M)
        assert torch.equal(score >= state.threshold[:, None], state.V)
        assert last is None or not torch.equal(state.threshold, last)
        last = state.threshold.clone()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(W=torch.zeros(3, 4, dtype=torch.int8)), TypeError, "W: expected"),
        (dict(diag=torch.zeros(3)), ValueError, r"diag: expected shape \(4,\)"),
        (dict(M=torch.zeros(3, 4, dtype=torch.float16)), TypeError, "M: expected torch.float32"),
        (dict(R=torch.zeros(4, 4)), ValueError, r"R: expected shape \(3, 4\)"),
        (dict(U=torch.zeros(3, 4, dtype=torch.float64)), TypeError, "U: expected torch.float32"),
        (dict(V=torch.zeros(3, 4)), TypeError, "V: expected torch.bool"),
        (dict(E=torch.zeros(3, 4, dtype=torch.bool)), TypeError, "E: expected"),
        (dict(M=torch.zeros(4, 3).T), ValueError, "M: expected contiguous rows"),
        (dict(k=5), ValueError, "k: expected 0 to 4, got 5"),
        (dict(group=3), ValueError, "group: expected a divisor"),
        (dict(fixed=torch.zeros(3, 4)), TypeError, "fixed: expected torch.bool"),
        (dict(target_gap=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "target_gap: expected torch.float32"),
        (dict(target_gap=torch.zeros(4, 3).T), ValueError, "target_gap: expected contiguous rows"),
        (dict(theta=torch.zeros(3), next_theta=torch.zeros(())), ValueError, r"theta: expected shape \(\)"),
        (dict(next_theta=torch.zeros(())), TypeError, "theta: expected a tensor, got float"),
        (dict(eta=torch.zeros(())), TypeError, "theta: expected a tensor, got float"),
        (dict(threshold=torch.zeros(4)), ValueError, r"threshold: expected shape \(3,\)"),
        (dict(threshold=torch.zeros(3, dtype=torch.int32)), TypeError, "threshold: expected torch.float32"),
        (dict(threshold=torch.zeros(6)[::2]), ValueError, "threshold: expected contiguous entries"),
        (dict(out=(torch.zeros(3), torch.zeros(4))), ValueError, r"out: expected shape \(3,\)"),
        (dict(out=torch.zeros(3, 2, device=DEVICE).unbind(1)), ValueError, "out: expected contiguous entries"),
    ],
)
def test_step_refuses_bad_input(change, error, match):
    zeros = torch.zeros(3, 4)
    arguments = dict(W=zeros, diag=zeros[0], M=zeros, R=zeros, U=zeros, V=zeros.bool(), E=zeros, k=2) | change
    with pytest.raises(error, match=match):
        row_step(**tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), arguments))
