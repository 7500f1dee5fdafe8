"""convex_update: M += eta (V - M), R += eta (U - R), reference against Triton."""

import pytest
import torch
from operations import DEVICE, OPS, SHAPES, assert_equal_enough, measure, normal

from sparsefw.kernels import cost, reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", OPS)
def test_convex_update(benchmark, kernel, shape):
    rows, d = shape
    M, R, U = (normal(rows, d, seed=seed) for seed in range(3))
    V, eta = U > 0, torch.linspace(0, 1, rows, device=DEVICE)
    update = OPS[kernel].convex_update
    expected, got = [M.clone(), R.clone()], [M.clone(), R.clone()]
    reference.convex_update(expected[0], V, expected[1], U, eta)
    update(got[0], V, got[1], U, eta)
    for a, b in zip(got, expected, strict=True):
        assert_equal_enough(a, b, 1e-6)
    measure(benchmark, lambda: update(M, V, R, U, eta), cost.convex_update(rows, d))
