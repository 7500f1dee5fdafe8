"""row_swaps against brute force over its pairs in float64, its invariants, and the specification."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, gram, in_float64, normal

from sparsefw.kernels import cpu, naive, triton_ops
from sparsefw.kernels import swaps as swaps_module
from sparsefw.kernels.swaps import row_swaps


@pytest.fixture(params=["cpu", "one chunk", "chunks"])
def backend(request, monkeypatch):
    """cpu.py; the Triton kernel with rows in one chunk; and in chunks of 64 columns, with tiles that end inside."""
    if request.param == "chunks":
        monkeypatch.setattr(swaps_module, "configuration", lambda rows, d, group: dict(BLOCK_R=8, BLOCK_D=64))
    return cpu if request.param == "cpu" else triton_ops


def start(rows: int, d: int, k: int, group: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of a search from Wanda's mask."""
    W, G = normal(rows, d, dtype=dtype), gram(d)
    V = naive.lmo(W.float().abs() * G.diagonal().sqrt(), k, group=group)
    return dict(W=W, G=G, R=naive.product(W.masked_fill(V, 0), G), V=V)


def copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def error(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The error of every row's mask, float64."""
    E = state["W"].double().masked_fill(state["V"], 0)
    return (E * (E @ state["G"].double())).sum(1)


def check(backend, state: dict[str, torch.Tensor], limit: int = 200, group: int = 0, **options) -> None:
    """Check that errors fall with as many weights, that R is the new mask's, and that swaps are naive's in float64."""
    before, expected = copy(state), in_float64(state)
    naive.row_swaps(**expected, limit=limit, group=group, **options)
    backend.row_swaps(**state, limit=limit, group=group, **options)
    assert torch.equal(state["W"], before["W"])
    units = (-1, group or state["V"].shape[1])
    assert torch.equal(state["V"].view(units).sum(1), before["V"].view(units).sum(1))
    E = state["W"].double().masked_fill(state["V"], 0)
    assert (state["R"] - E @ state["G"].double()).abs().max() <= 1e-5 * before["R"].abs().max()
    assert (error(state) <= error(before) * (1 + 1e-6)).all()
    # Where two pairs are equal up to rounding, searches may go different ways; their errors are then only close.
    same = (state["V"] == expected["V"]).all(1)
    assert same.double().mean() >= 0.9
    assert (error(state)[same] == error(expected)[same]).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 1, 1), (1, 131, 50), (37, 131, 0), (37, 131, 131), (37, 200, 90)])
def test_swaps_of_rows(backend, shape):
    rows, d, k = shape
    check(backend, start(rows, d, k))


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 5), (16, 32), (0, 4), (4, 4)])
def test_swaps_of_groups(backend, n, m, fixed):
    state = start(20, 6 * m, n, m)
    options = {}
    if fixed:
        options["fixed"] = naive.lmo(normal(20, 6 * m, seed=5).masked_fill(~state["V"], -torch.inf), 2 * n)
    check(backend, state, group=m, **options)
    if fixed:
        assert (state["V"] | ~options["fixed"]).all()


@pytest.mark.slow
def test_swaps_keep_the_fixed_entries(backend):
    state = start(37, 131, 50)
    fixed = naive.lmo(normal(37, 131, seed=5).masked_fill(~state["V"], -torch.inf), 25)
    check(backend, state, fixed=fixed)
    assert (state["V"] | ~fixed).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_swaps_of_every_dtype(backend, dtype):
    check(backend, start(20, 131, 50, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_is_that_of_a_row(backend, limit):
    state = start(37, 131, 50)
    before = state["V"].clone()
    check(backend, state, limit=limit)
    # None of these rows is done after one swap; later swaps may take back a part of earlier ones.
    moved = (state["V"] != before).sum(1)
    assert (moved == 2 * limit).all() if limit < 2 else ((moved <= 2 * limit) & (moved > 0)).all()
    assert moved.max() == 2 * limit


@pytest.mark.parametrize("group", [0, 8])
def test_a_swap_is_the_best_of_its_pairs(backend, group):
    """Brute force tries all pairs that hold the best a of a group, or its best b."""
    d, m = 48, group or 48
    state = start(6, d, m // 2, group)
    V, G = state["V"].clone(), state["G"].double()
    backend.row_swaps(**state, limit=1, group=group)
    for row, (w, v) in enumerate(zip(state["W"].double(), V, strict=True)):
        e = w.masked_fill(v, 0)
        change = torch.full((d, d), torch.inf, dtype=torch.float64)
        for g in range(0, d, m):
            kept, removed = ([j for j in range(g, g + m) if v[j] == keep] for keep in (True, False))

            def alone(j, e=e, w=w, v=v):
                moved = e.clone()
                moved[j] = w[j] if v[j] else 0
                return (moved @ G @ moved).item()

            best_i, best_p = min(kept, key=alone), min(removed, key=alone)
            for i, p in [(best_i, p) for p in removed] + [(i, best_p) for i in kept]:
                moved = e.clone()
                moved[i], moved[p] = w[i], 0
                change[i, p] = moved @ G @ moved - e @ G @ e
        i, p = divmod(int(change.argmin()), d)
        expected = v.clone()
        if change.min() < 0:
            # Otherwise no swap lowers the error of the row.
            expected[i], expected[p] = False, True
        assert torch.equal(state["V"][row], expected)


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 4])
def test_a_search_that_ended_does_not_go_on(backend, group):
    state = start(20, 96, 2 if group else 40, group)
    backend.row_swaps(**state, limit=500, group=group)
    again = copy(state)
    backend.row_swaps(**again, limit=500, group=group)
    assert torch.equal(again["V"], state["V"])
    assert torch.equal(again["R"], state["R"])


@pytest.mark.slow
def test_twin_inputs_are_not_swapped_for_each_other(backend):
    """It makes no difference but rounding which of two equal inputs is kept; a search could follow that for ever."""
    half = start(20, 48, 20)
    W, G = half["W"].repeat(1, 2), half["G"].repeat(2, 2)
    V = naive.lmo(normal(20, 96, seed=3), 40)
    state = dict(W=W, G=G, R=naive.product(W.masked_fill(V, 0), G), V=V)
    backend.row_swaps(**state, limit=150)
    again = copy(state)
    backend.row_swaps(**again, limit=1)
    assert torch.equal(again["V"], state["V"])


def test_dead_inputs_are_not_swapped_for_each_other(backend):
    state = start(5, 64, 20)
    state["G"][:32] = state["G"][:, :32] = 0
    state["R"] = naive.product(state["W"].masked_fill(state["V"], 0), state["G"])
    before = state["V"].clone()
    check(backend, state)
    moved = state["V"] != before
    assert not (moved[:, :32] & state["V"][:, :32]).any()


@pytest.mark.slow
def test_swaps_repeat_bit_by_bit_and_do_not_depend_on_the_other_rows(backend):
    once, again, part = start(37, 131, 50), start(37, 131, 50), start(37, 131, 50)
    part = {name: tensor if name == "G" else tensor[:5].clone() for name, tensor in part.items()}
    for state in (once, again, part):
        backend.row_swaps(**state, limit=50)
    for name in ("R", "V"):
        assert torch.equal(once[name], again[name])
        assert torch.equal(once[name][:5], part[name])


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 32])
def test_swaps_of_long_rows_in_slices(backend, group):
    state = start(2, 2048, 16 if group else 900, group)
    wide = {name: torch.cat((t, t), 1)[:, t.shape[1] :] for name, t in state.items()}
    backend.row_swaps(**wide, limit=5, group=group)
    check(backend, state, limit=5, group=group)
    assert torch.equal(wide["V"], state["V"])


def test_swaps_of_no_rows(backend):
    state = {name: tensor if name == "G" else tensor[:0] for name, tensor in start(3, 131, 50).items()}
    backend.row_swaps(**state, limit=5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(W=torch.zeros(3, 4, dtype=torch.int8)), TypeError, "W: expected"),
        (dict(G=torch.zeros(3, 4)), ValueError, r"G: expected shape \(4, 4\)"),
        (dict(R=torch.zeros(3, 4, dtype=torch.float16)), TypeError, "R: expected torch.float32"),
        (dict(V=torch.zeros(3, 4)), TypeError, "V: expected torch.bool"),
        (dict(R=torch.zeros(4, 3).T), ValueError, "R: expected contiguous rows"),
        (dict(limit=-1), ValueError, "limit: expected at least 0, got -1"),
        (dict(group=3), ValueError, "group: expected a divisor"),
        (dict(fixed=torch.zeros(3, 4)), TypeError, "fixed: expected torch.bool"),
    ],
)
def test_swaps_refuse_bad_input(change, error, match):
    zeros = torch.zeros(3, 4)
    arguments = dict(W=zeros, G=torch.zeros(4, 4), R=zeros, V=zeros.bool(), limit=1) | change
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(error, match=match):
        row_swaps(**moved)
