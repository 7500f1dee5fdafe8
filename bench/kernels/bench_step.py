"""row_step: an iteration without its product; topk is a chain of torch's operations with `topk` and a scatter."""

import cost
import pytest
import torch
from bare import topk_step
from operations import (
    PRECISION,
    WEIGHT,
    assert_equal_enough,
    budget,
    cases,
    gram,
    measure,
    normal,
    numbers,
    row_state,
    ways,
)

from sparsefw.kernels import cpu
from sparsefw.kernels.definitions import RowState

WAYS = ways("row_step", topk=topk_step)


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_row_step(benchmark, way, shape, pattern):
    rows, d = shape
    k, group, d = budget(pattern, d)
    W, G = normal(rows, d, dtype=WEIGHT), gram(d)
    diag = G.diagonal().contiguous()
    V = cpu.lmo(normal(rows, d, seed=1), k, group=group)
    M = cpu.lmo(normal(rows, d, seed=2), k, group=group).float()
    weight = W.float()
    R = cpu.product(weight * (1 - M), G, precision=PRECISION)
    U = cpu.product(weight * ~V, G, precision=PRECISION)

    def fresh() -> tuple:
        # The step works in place and overwrites U: every call starts from the same state.
        matrices = M.clone(), R.clone(), U.clone(), V.clone(), torch.empty_like(W)
        return (row_state(W, diag, *matrices, k, group=group),)

    thetas = numbers(way, theta=0.5, next_theta=0.6)

    def step(state: RowState) -> RowState:
        WAYS[way](state, **thetas)
        return state

    (expected,) = fresh()
    cpu.row_step(expected, theta=0.5, next_theta=0.6)
    got = step(*fresh())
    assert_equal_enough(got.error, expected.error, 1e-4)
    assert (got.V != expected.V).float().mean() < 1e-4
    measure(benchmark, step, cost.row_step(rows, d, W=W.element_size(), E=W.element_size()), setup=fresh)
