"""gradient: -2 W * ((W * (1 - M)) G) in one pass, reference against Triton."""

import pytest
import torch
from operations import DEVICE, OPS, PRECISION, SHAPES, WEIGHT, assert_equal_enough, gram, measure, normal

from sparsefw.kernels import cost, reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", OPS)
def test_gradient(benchmark, kernel, shape):
    rows, d = shape
    W, M, G = normal(rows, d, dtype=WEIGHT), normal(rows, d, seed=1).sigmoid(), gram(d)
    out = torch.empty(rows, d, device=DEVICE)
    gradient = OPS[kernel].gradient
    expected = reference.gradient(W, M, G, precision=PRECISION)
    assert_equal_enough(gradient(W, M, G, precision=PRECISION, out=out), expected, 2e-3)
    least = cost.gradient(rows, d, W=W.element_size(), G=G.element_size())
    measure(benchmark, lambda: gradient(W, M, G, precision=PRECISION, out=out), least)
