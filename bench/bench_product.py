"""product: U = E G, reference against Triton, by shape and precision."""

import pytest
import torch
from operations import DEVICE, OPS, SHAPES, WEIGHT, assert_equal_enough, gram, measure, normal

from sparsefw.kernels import reference

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
    moved = E.nbytes + G.nbytes + out.nbytes
    measure(benchmark, lambda: product(E, G, precision=precision, out=out), flops=2 * rows * d * d, bytes=moved)
