"""gram_accumulate (lower triangle of G += X^T X), cross_accumulate (B += D^T X) and mirror_lower (G made symmetric).

Bare is the library's product: X^T X, the full square, and D^T X.
"""

import cost
import pytest
import torch
from bare import bare_product
from operations import DEVICE, SHAPES, TOKENS, UNIT, WEIGHT, assert_equal_enough, cases, measure, normal, ways
from torch import Tensor

from sparsefw.kernels import cpu


def bare_gram(G: Tensor, X: Tensor) -> Tensor:
    return bare_product(X.T, X, precision="ieee")


def bare_cross(B: Tensor, D: Tensor, X: Tensor) -> Tensor:
    return bare_product(D.T, X, precision="ieee")


GRAM, CROSS = ways("gram_accumulate", bare=bare_gram), ways("cross_accumulate", bare=bare_cross)
MIRROR = ways("mirror_lower")
WIDTHS = sorted({d for _, d in SHAPES})


@pytest.mark.parametrize(("way", "d"), cases(GRAM, WIDTHS))
def test_gram_accumulate(benchmark, way, d):
    X, G = normal(TOKENS, d, dtype=WEIGHT), torch.zeros(d, d, device=DEVICE)
    accumulate = GRAM[way]
    expected = cpu.gram_accumulate(torch.zeros_like(G), X)
    assert_equal_enough(accumulate(G, X).tril(), expected.tril(), 1e-5)
    measure(benchmark, lambda: accumulate(G, X), cost.gram_accumulate(TOKENS, d, X=X.element_size()), unit=UNIT)


@pytest.mark.parametrize(("way", "shape"), cases(CROSS), ids=str)
def test_cross_accumulate(benchmark, way, shape):
    rows, d = shape
    D, X = normal(TOKENS, rows, dtype=WEIGHT), normal(TOKENS, d, dtype=WEIGHT, seed=1)
    B = torch.zeros(rows, d, device=DEVICE)
    accumulate = CROSS[way]
    expected = cpu.cross_accumulate(torch.zeros_like(B), D, X)
    assert_equal_enough(accumulate(B, D, X), expected, 1e-5)
    least = cost.cross_accumulate(TOKENS, rows, d, X=X.element_size())
    measure(benchmark, lambda: accumulate(B, D, X), least, unit=UNIT)


@pytest.mark.parametrize(("way", "d"), cases(MIRROR, WIDTHS))
def test_mirror_lower(benchmark, way, d):
    G = normal(d, d)
    mirror = MIRROR[way]
    assert torch.equal(mirror(G.clone()), cpu.mirror_lower(G.clone()))
    measure(benchmark, lambda: mirror(G), cost.mirror_lower(d))
