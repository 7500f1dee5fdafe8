"""row_swaps: the search for the best 1-swaps that follows Frank-Wolfe."""

import cost
import pytest
from operations import PRECISION, SHAPES, WEIGHT, assert_equal_enough, budget, gram, measure, normal

from sparsefw.kernels import cpu, triton_ops
from sparsefw.solver.objective import mask_error

SWAPS = 10
WAYS = {"torch": cpu.row_swaps, "triton": triton_ops.row_swaps}


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_row_swaps(benchmark, way, shape, pattern):
    rows, d = shape
    k, group, d = budget(pattern, d)
    W, G = normal(rows, d, dtype=WEIGHT), gram(d)
    # From Wanda's mask every row has enough swaps to make.
    V = cpu.lmo(W.float().abs() * G.diagonal().sqrt(), k, group=group)
    R = cpu.product(W.masked_fill(V, 0), G, precision=PRECISION)

    def fresh() -> tuple:
        return W, G, R.clone(), V.clone(), SWAPS

    def swaps(*state: object) -> None:
        WAYS[way](*state, group=group)

    expected, got = fresh(), fresh()
    cpu.row_swaps(*expected, group=group)
    swaps(*got)
    # Swaps that are equal up to rounding may be made in either order, so the final errors are compared.
    errors = [mask_error(W.float(), state[3], G).double().sum(0, keepdim=True) for state in (got, expected)]
    assert_equal_enough(*errors, 1e-3)
    measure(benchmark, swaps, cost.row_swaps(rows, d, SWAPS, W=W.element_size()), setup=fresh)
