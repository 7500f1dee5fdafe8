"""product: U = E G, reference against Triton, by shape and precision."""

import pytest
import torch
from operations import DEVICE, OPS, SHAPES, WEIGHT, assert_equal_enough, gram, measure, normal

from sparsefw.kernels import cost, reference

PRECISIONS = {"ieee": 1e-5, "tf32": 2e-3, "bf16": 2e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", OPS)
def test_product(benchmark, kernel, shape, precision):
    rows, d = shape
    E, G = normal(rows, d, dtype=WEIGHT), gram(d)
    G = G.bfloat16() if precision == "bf16" else G
    out = torch.empty(rows, d, device=DEVICE)
    product = OPS[kernel].product
    expected = reference.product(E, G, precision=precision)
    assert_equal_enough(product(E, G, precision=precision, out=out), expected, PRECISIONS[precision])
    least = cost.product(rows, d, E=E.element_size(), G=G.element_size())
    measure(benchmark, lambda: product(E, G, precision=precision, out=out), least)
