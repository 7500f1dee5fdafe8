"""gram_accumulate: G += X^T X, reference (the full square) against Triton (one triangle)."""

import pytest
import torch
from operations import DEVICE, OPS, SHAPES, TOKENS, WEIGHT, assert_equal_enough, measure, normal

from sparsefw.kernels import cost, reference


@pytest.mark.parametrize("d", sorted({d for _, d in SHAPES}))
@pytest.mark.parametrize("kernel", OPS)
def test_gram_accumulate(benchmark, kernel, d):
    X, G = normal(TOKENS, d, dtype=WEIGHT), torch.zeros(d, d, device=DEVICE)
    accumulate = OPS[kernel].gram_accumulate
    expected = reference.gram_accumulate(torch.zeros_like(G), X)
    assert_equal_enough(accumulate(G, X), expected, 1e-5)
    measure(benchmark, lambda: accumulate(G, X), cost.gram_accumulate(TOKENS, d, X=X.element_size()))
