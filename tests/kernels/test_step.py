"""row_step against float64, the definition of each of its parts, and the cpu."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, assert_near, garbage, gram, normal
from torch.utils._pytree import tree_map_only

from sparsefw.kernels import cpu
from sparsefw.kernels import step as step_module
from sparsefw.kernels.step import row_step


@pytest.fixture(params=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    """Rows in one chunk, and in chunks of 64 columns of which the first 128 keys are held."""
    if request.param == "chunks":

        def configuration(rows: int, d: int, group: int) -> dict[str, int]:
            return dict(BLOCK_R=32, BLOCK_D=64, SEARCH_D=128)

        monkeypatch.setattr(step_module, "configuration", configuration)


def solver_state(rows: int, d: int, k, group: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of a step in the middle of a solve: M inside the polytope, R and U its products, V a vertex."""
    W, G = normal(rows, d, dtype=dtype), gram(d)
    V = cpu.lmo(normal(rows, d, seed=3), k, group=group)
    M = 0.3 * V + 0.7 * cpu.lmo(normal(rows, d, seed=4), k, group=group)
    weight = W.float()
    return dict(
        W=W, diag=G.diagonal().contiguous(), M=M, R=(weight * (1 - M)) @ G, U=(weight * ~V) @ G, V=V,
        E=garbage(rows, d, dtype=dtype),
    )  # fmt: skip


def copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def float64_step(state, eta=None, theta=0.0):
    """Step size, M, R and error by the formulas, in float64."""
    W, diag, M, R, U, V = (state[name].double() for name in ("W", "diag", "M", "R", "U", "V"))
    q, D = W * W * diag, V - M
    lin = (D * (-2 * W * R + theta * q * (1 - 2 * M))).sum(1)
    quad = (W * D * (R - U)).sum(1) - theta * (q * D * D).sum(1)
    if eta is None:
        eta = torch.where(quad > 0, (-lin / (2 * quad)).clamp(0, 1), (lin + quad < 0).double())
    else:
        eta = torch.full_like(lin, eta)
    M, R = M + eta[:, None] * D, R + eta[:, None] * (U - R)
    return eta, M, R, (W * (1 - M) * R).sum(1)


def rounding_of_step(state, theta=0.0):
    """What one fp32 rounding of every term of its two sums can do to each row's step size, first order."""
    W, diag, M, R, U, V = (state[name].double() for name in ("W", "diag", "M", "R", "U", "V"))
    q, D = W * W * diag, V - M
    eta, *_ = float64_step(state, theta=theta)
    lin = (D * (-2 * W * R + theta * q * (1 - 2 * M))).abs().sum(1)
    quad, terms = (W * D * (R - U) - theta * q * D * D).sum(1), (W * D * (R - U)).abs() + theta * q * D * D
    # 0 / 0: the vertex is where the state is, and there is nothing to round.
    return 2.0**-24 * ((lin + 2 * eta * terms.sum(1)) / (2 * quad).abs()).nan_to_num(posinf=torch.inf)


def check_step(state, k, **options):
    """The floats against float64, the vertex against the lmo of the very state that the kernel left."""
    expected, start = copy(state), copy(state)
    eta_reference, error_reference = cpu.row_step(**expected, k=k, **options)
    eta, error = row_step(**state, k=k, **options)
    line = {name: options[name] for name in ("eta", "theta") if name in options}
    eta_truth, *truths = float64_step(start, **line)
    if options.get("eta") is None:
        # Sums that nearly cancel, differently by row: the reference's worst row says little about another.
        allowed = 4 * rounding_of_step(start, options.get("theta", 0.0))
        assert ((eta - eta_truth).abs() <= allowed).all()
        assert ((eta_reference - eta_truth).abs() <= allowed).all()
    else:
        assert_near(eta, eta_reference, eta_truth)
    for got, by_reference, truth in zip(
        (state["M"], state["R"], error), (expected["M"], expected["R"], error_reference), truths, strict=True
    ):
        assert_near(got, by_reference, truth)
    next_theta = options.get("next_theta", 0.0)
    W, M = state["W"].double(), state["M"].double()
    score = 2 * W * state["R"].double() - next_theta * W * W * state["diag"].double() * (1 - 2 * M)
    selection = {name: options[name] for name in ("group", "fixed") if name in options}
    lacks = options.get("lacks", torch.zeros_like(state["M"]))
    # Scores apart by less than their rounding may swap: the float64 choice is compared through its worst score.
    V = cpu.lmo(score.float(), k, positive=next_theta < 1, **selection)
    swapped = state["V"] != V
    assert swapped.sum() <= 2 + V.numel() // 10000
    assert torch.equal(V.sum(1), state["V"].sum(1))
    assert torch.equal(state["E"], (lacks + start["W"].masked_fill(state["V"], 0)).to(state["E"].dtype))
    return eta, error


@pytest.mark.parametrize(("theta", "next_theta"), [(0.0, 0.0), (0.0, 0.3), (0.4, 0.6), (1.0, 1.0)])
@pytest.mark.parametrize("eta", [None, 0.25])
@pytest.mark.usefixtures("chunks")
def test_step_by_rows(eta, theta, next_theta):
    check_step(solver_state(37, 262, 100), 100, eta=eta, theta=theta, next_theta=next_theta)


@pytest.mark.parametrize("next_theta", [0.6, 1.0])
@pytest.mark.parametrize("eta", [None, 0.25])
@pytest.mark.usefixtures("chunks")
def test_numbers_may_be_read_when_the_step_runs(eta, next_theta):
    given, stored = (solver_state(37, 262, 100) for _ in range(2))
    numbers = dict(theta=0.4, next_theta=next_theta) | ({} if eta is None else dict(eta=eta))
    found = row_step(**given, k=100, **numbers)
    tensors = {name: torch.tensor(number, device=DEVICE) for name, number in numbers.items()}
    out = garbage(37), garbage(37)
    written = row_step(**stored, k=100, **tensors, out=out)
    assert all(a is b for a, b in zip(written, out, strict=True))
    for a, b in zip((*found, *given.values()), (*out, *stored.values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "d", "k"), [(1, 1, 0), (1, 1, 1), (1, 131, 50), (5, 131, 0), (5, 131, 131)])
def test_step_of_odd_shapes(rows, d, k):
    check_step(solver_state(rows, d, k), k, next_theta=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("chunks")
def test_step_of_every_dtype(dtype):
    check_step(solver_state(20, 131, 50, dtype=dtype), 50, theta=0.2, next_theta=0.4)


@pytest.mark.usefixtures("chunks")
def test_the_removed_weights_are_rounded_to_nearest():
    state = solver_state(20, 131, 50)
    state["E"] = garbage(20, 131, dtype=torch.bfloat16)
    check_step(state, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.usefixtures("chunks")
def test_what_the_weights_lack_is_removed_too(group, dtype):
    k = 2 if group else 50
    state, lacks = solver_state(37, 132, k, group), normal(37, 132, seed=8)
    state["E"] = garbage(37, 132, dtype=dtype)
    check_step(state, k, group=group, lacks=lacks, theta=0.2, next_theta=0.4)


@pytest.mark.parametrize("next_theta", [0.5, 1.0])
@pytest.mark.usefixtures("chunks")
def test_step_with_a_budget_per_row(next_theta):
    k = torch.randint(0, 132, (37,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_step(solver_state(37, 131, k), k, next_theta=next_theta)


@pytest.mark.parametrize("next_theta", [0.5, 1.0])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.usefixtures("chunks")
def test_step_keeps_the_fixed_entries(group, next_theta):
    k = 2 if group else 60
    state = solver_state(37, 132, k, group)
    fixed = cpu.lmo(normal(37, 132, seed=9), k // 2, group=group)
    check_step(state, k, group=group, fixed=fixed, next_theta=next_theta)
    assert (state["V"] | ~fixed).all()


@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 5), (16, 32)])
@pytest.mark.usefixtures("chunks")
def test_step_by_groups(n, m, theta):
    check_step(solver_state(20, 6 * m, n, m), n, group=m, theta=theta, next_theta=theta)


def test_ties_go_to_the_lower_index():
    state = solver_state(3, 131, 40)
    for name, value in dict(W=1.0, diag=1.0, M=0.5, R=1.0, U=1.0).items():
        state[name].fill_(value)
    row_step(**state, k=40)
    assert torch.equal(state["V"], torch.arange(131, device=DEVICE).expand(3, 131) < 40)


def test_only_positive_scores_are_taken_before_the_penalty_is_full():
    state = solver_state(3, 131, 40)
    state["R"] = -state["W"]
    state["U"] = -state["W"]
    row_step(**copy(state), k=40, next_theta=1.0)
    row_step(**state, k=40)
    assert not state["V"].any()


def test_a_nan_shows_in_the_error_of_its_row():
    state = solver_state(3, 131, 40)
    state["U"][1, 7] = torch.nan
    _, error = row_step(**state, k=40)
    assert error.isnan().tolist() == [False, True, False]


def test_step_repeats_bit_by_bit():
    once, again = (solver_state(37, 131, 50) for _ in range(2))
    results = [row_step(**state, k=50, theta=0.3, next_theta=0.4) for state in (once, again)]
    for a, b in zip((*results[0], *once.values()), (*results[1], *again.values()), strict=True):
        assert torch.equal(a, b)


def test_step_does_not_depend_on_the_other_rows():
    whole = solver_state(37, 131, 50)
    part = {name: tensor.clone() if name == "diag" else tensor[:5].clone() for name, tensor in whole.items()}
    row_step(**whole, k=50, next_theta=0.4)
    row_step(**part, k=50, next_theta=0.4)
    for name in ("M", "R", "V", "E"):
        assert torch.equal(whole[name][:5], part[name])


def test_step_of_the_longest_row():
    state = solver_state(1, 131, 50)
    for name, tensor in state.items():
        state[name] = tensor.repeat(501) if name == "diag" else tensor.repeat(1, 501)
        state[name] = state[name][..., :65536].contiguous()
    check_step(state, 30000, theta=0.2, next_theta=0.4)


def test_step_of_row_slices():
    state, expected = solver_state(20, 131, 50), solver_state(20, 131, 50)
    wide = {
        name: tensor if name == "diag" else torch.cat((tensor, tensor), 1)[:, 131:] for name, tensor in state.items()
    }
    row_step(**wide, k=50)
    row_step(**expected, k=50)
    assert torch.equal(wide["V"], expected["V"])
    assert torch.equal(wide["R"], expected["R"])


def test_step_of_no_rows():
    state = {name: t if name == "diag" else t[:0] for name, t in solver_state(3, 131, 50).items()}
    eta, error = row_step(**state, k=50)
    assert eta.shape == error.shape == (0,)


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
        (dict(lacks=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "lacks: expected torch.float32"),
        (dict(lacks=torch.zeros(4, 3).T), ValueError, "lacks: expected contiguous rows"),
        (dict(theta=torch.zeros(3), next_theta=torch.zeros(())), ValueError, r"theta: expected shape \(\)"),
        (dict(next_theta=torch.zeros(())), TypeError, "theta: expected a tensor, got float"),
        (dict(eta=torch.zeros(())), TypeError, "theta: expected a tensor, got float"),
        (dict(out=(torch.zeros(3), torch.zeros(4))), ValueError, r"out: expected shape \(3,\)"),
        (dict(out=torch.zeros(3, 2, device=DEVICE).unbind(1)), ValueError, "out: expected contiguous entries"),
    ],
)
def test_step_refuses_bad_input(change, error, match):
    zeros = torch.zeros(3, 4)
    arguments = dict(W=zeros, diag=zeros[0], M=zeros, R=zeros, U=zeros, V=zeros.bool(), E=zeros, k=2) | change
    with pytest.raises(error, match=match):
        row_step(**tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), arguments))
