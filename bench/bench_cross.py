"""cross_accumulate: B += D^T X, reference against Triton."""

import pytest
import torch
from operations import DEVICE, OPS, SHAPES, TOKENS, WEIGHT, assert_equal_enough, measure, normal

from sparsefw.kernels import cost, reference


@pytest.mark.parametrize(("rows", "d"), SHAPES)
@pytest.mark.parametrize("kernel", OPS)
def test_cross_accumulate(benchmark, kernel, rows, d):
    D, X = normal(TOKENS, rows, dtype=WEIGHT), normal(TOKENS, d, dtype=WEIGHT, seed=1)
    B = torch.zeros(rows, d, device=DEVICE)
    accumulate = OPS[kernel].cross_accumulate
    expected = reference.cross_accumulate(torch.zeros_like(B), D, X)
    assert_equal_enough(accumulate(B, D, X), expected, 1e-5)
    measure(benchmark, lambda: accumulate(B, D, X), cost.cross_accumulate(TOKENS, rows, d, X=X.element_size()))
