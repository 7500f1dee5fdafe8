"""cross_accumulate: B += D^T X; bare is the library's product D^T X."""

import cost
import pytest
import torch
from bare import bare_product
from operations import DEVICE, TOKENS, UNIT, WEIGHT, assert_equal_enough, cases, measure, normal, ways

from sparsefw.kernels import cpu


def bare(B: torch.Tensor, D: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return bare_product(D.T, X, precision="ieee")


WAYS = ways("cross_accumulate", bare=bare)


@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_cross_accumulate(benchmark, way, shape):
    rows, d = shape
    D, X = normal(TOKENS, rows, dtype=WEIGHT), normal(TOKENS, d, dtype=WEIGHT, seed=1)
    B = torch.zeros(rows, d, device=DEVICE)
    accumulate = WAYS[way]
    expected = cpu.cross_accumulate(torch.zeros_like(B), D, X)
    assert_equal_enough(accumulate(B, D, X), expected, 1e-5)
    least = cost.cross_accumulate(TOKENS, rows, d, X=X.element_size())
    measure(benchmark, lambda: accumulate(B, D, X), least, unit=UNIT)
