"""gradient: -2 W * ((W * (1 - M)) G) in one pass."""

import pytest
import torch
from operations import DEVICE, PRECISION, WEIGHT, assert_equal_enough, cases, gram, measure, normal, ways

from sparsefw.kernels import cost, cpu

WAYS = ways("gradient")


@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_gradient(benchmark, way, shape):
    rows, d = shape
    W, M, G = normal(rows, d, dtype=WEIGHT), normal(rows, d, seed=1).sigmoid(), gram(d)
    out = torch.empty(rows, d, device=DEVICE)
    gradient = WAYS[way]
    expected = cpu.gradient(W, M, G, precision=PRECISION)
    assert_equal_enough(gradient(W, M, G, precision=PRECISION, out=out), expected, 2e-3)
    least = cost.gradient(rows, d, W=W.element_size(), G=G.element_size())
    measure(benchmark, lambda: gradient(W, M, G, precision=PRECISION, out=out), least, unit=PRECISION)
