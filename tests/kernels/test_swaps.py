"""row_swaps against its invariants and the specification, which a brute force over its pairs confirms."""

import pytest
import torch
from helpers import naive
from helpers.families import first_is_fast
from helpers.kernel_inputs import DTYPES, copied, gram, in_float64, normal


def start(rows: int, d: int, k: int, group: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of a search from Wanda's mask."""
    W, G = normal(rows, d, dtype=dtype), gram(d)
    V = naive.lmo(W.float().abs() * G.diagonal().sqrt(), k, group=group)
    return dict(W=W, G=G, R=naive.product(W.masked_fill(V, 0), G), V=V)


def error(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The error of every row's mask, float64."""
    E = state["W"].double().masked_fill(state["V"], 0)
    return (E * (E @ state["G"].double())).sum(1)


def some_of(V: torch.Tensor, k: int) -> torch.Tensor:
    """k entries of every row, or all that V has."""
    return V & naive.lmo(normal(*V.shape, seed=5).masked_fill(~V, -torch.inf), k)


def check(backend, state: dict[str, torch.Tensor], limit: int = 40, group: int = 0, fixed=None) -> None:
    """Check that errors fall with as many weights, that R is the new mask's, and that swaps are naive's in float64."""
    before, expected = copied(state), in_float64(state)
    naive.row_swaps(**expected, limit=limit, group=group, fixed=fixed)
    backend.row_swaps(**state, limit=limit, group=group, fixed=fixed)
    assert fixed is None or (state["V"] | ~fixed).all()
    units = (-1, group or state["V"].shape[1])
    assert torch.equal(state["V"].view(units).sum(1), before["V"].view(units).sum(1))
    E = state["W"].double().masked_fill(state["V"], 0)
    assert (state["R"] - E @ state["G"].double()).abs().max() <= 1e-5 * before["R"].abs().max()
    assert (error(state) <= error(before) * (1 + 1e-6)).all()
    # Searches may take different pairs that are equal up to rounding; then their errors are only close.
    same = (state["V"] == expected["V"]).all(1)
    assert same.double().mean() >= 0.9


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 1, 1), (5, 131, 0), (5, 131, 131), (20, 131, 50)])
def test_rows(row_backend, shape):
    check(row_backend, start(*shape))


@pytest.mark.parametrize("fixed", first_is_fast([True, False]))
@pytest.mark.parametrize(("n", "m"), first_is_fast([(2, 4), (3, 5), (0, 4), (4, 4), (16, 32)], 4))
def test_groups(row_backend, n, m, fixed):
    state = start(20, 6 * m, n, m)
    check(row_backend, state, group=m, fixed=some_of(state["V"], 2 * n) if fixed else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_fixed_entries(row_backend, dtype):
    state = start(9, 131, 50, dtype=dtype)
    check(row_backend, state, fixed=some_of(state["V"], 25))


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_is_that_of_a_row(row_backend, limit):
    state = start(37, 131, 50)
    before = state["V"].clone()
    check(row_backend, state, limit=limit)
    # None of these rows is done after one swap; later swaps may take back a part of earlier ones.
    moved = (state["V"] != before).sum(1)
    assert (moved == 2 * limit).all() if limit < 2 else ((moved <= 2 * limit) & (moved > 0)).all()
    assert moved.max() == 2 * limit


def test_twin_inputs_are_not_swapped_for_each_other(row_backend):
    """It makes no difference but rounding which of two equal inputs is kept; a search could follow that for ever."""
    half = start(5, 32, 14)
    W, G = half["W"].repeat(1, 2), half["G"].repeat(2, 2)
    V = naive.lmo(normal(5, 64, seed=3), 28)
    state = dict(W=W, G=G, R=naive.product(W.masked_fill(V, 0), G), V=V)
    row_backend.row_swaps(**state, limit=150)
    again = copied(state)
    row_backend.row_swaps(**again, limit=1)
    assert torch.equal(again["V"], state["V"])
