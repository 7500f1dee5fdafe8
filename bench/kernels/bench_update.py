"""convex_update: M += eta (V - M), R += eta (U - R)."""

import pytest
import torch
from operations import DEVICE, assert_equal_enough, cases, measure, normal, ways

from sparsefw.kernels import cost, cpu

WAYS = ways("convex_update")


@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_convex_update(benchmark, way, shape):
    rows, d = shape
    M, R, U = (normal(rows, d, seed=seed) for seed in range(3))
    V, eta = U > 0, torch.linspace(0, 1, rows, device=DEVICE)
    update = WAYS[way]
    expected, got = [M.clone(), R.clone()], [M.clone(), R.clone()]
    cpu.convex_update(expected[0], V, expected[1], U, eta)
    update(got[0], V, got[1], U, eta)
    for a, b in zip(got, expected, strict=True):
        assert_equal_enough(a, b, 1e-6)
    measure(benchmark, lambda: update(M, V, R, U, eta), cost.convex_update(rows, d))
