"""gram_accumulate: lower triangle of G += X^T X; bare is the library's product X^T X, the full square."""

import cost
import pytest
import torch
from bare import bare_product
from operations import DEVICE, SHAPES, TOKENS, UNIT, WEIGHT, assert_equal_enough, cases, measure, normal, ways

from sparsefw.kernels import cpu


def bare(G: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return bare_product(X.T, X, precision="ieee")


WAYS = ways("gram_accumulate", bare=bare)


@pytest.mark.parametrize(("way", "d"), cases(WAYS, sorted({d for _, d in SHAPES})))
def test_gram_accumulate(benchmark, way, d):
    X, G = normal(TOKENS, d, dtype=WEIGHT), torch.zeros(d, d, device=DEVICE)
    accumulate = WAYS[way]
    expected = cpu.gram_accumulate(torch.zeros_like(G), X)
    assert_equal_enough(accumulate(G, X).tril(), expected.tril(), 1e-5)
    measure(benchmark, lambda: accumulate(G, X), cost.gram_accumulate(TOKENS, d, X=X.element_size()), unit=UNIT)
