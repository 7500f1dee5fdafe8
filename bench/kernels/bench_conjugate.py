"""conjugate_step: a step of conjugate gradients without its product."""

import cost
import pytest
import torch
from operations import DEVICE, PRECISION, assert_equal_enough, cases, gram, measure, normal, ways

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend

WAYS = ways("conjugate_step")


@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_conjugate_step(benchmark, way, shape):
    rows, d = shape
    G = gram(d)
    inverse, mask = 1 / G.diagonal(), normal(rows, d, seed=3) > 0
    Z, R = (normal(rows, d, seed=seed) for seed in range(2))
    P = Backend(cpu, PRECISION).operand(normal(rows, d, seed=2))
    U = cpu.product(P, G, precision=PRECISION)
    del G

    def fresh() -> tuple:
        # The step works in place: every call starts from the same state.
        rz = torch.ones(rows, device=DEVICE)
        return Z.clone(), R.clone(), P.clone(), U, rz, 1e-12 * rz, inverse

    def step(*state: object) -> None:
        WAYS[way](*state, mask=mask)

    expected, got = fresh(), fresh()
    cpu.conjugate_step(*expected, mask=mask)
    step(*got)
    for a, b, tolerance in zip(got[:3], expected[:3], (1e-4, 1e-4, 1e-2), strict=True):
        assert_equal_enough(a, b, tolerance)
    del expected, got
    measure(benchmark, step, cost.conjugate_step(rows, d, P=P.itemsize), setup=fresh)
