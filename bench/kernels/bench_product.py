"""product: U = E G, by shape and precision; bare is the library's product of two operands of one type."""

from dataclasses import replace

import cost
import pytest
import torch
from bare import bare_product, operands
from operations import DEVICE, WEIGHT, assert_equal_enough, cases, gram, measure, normal, ways

from sparsefw.kernels import cpu

PRECISIONS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
WAYS = ways("product", bare=bare_product)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_product(benchmark, way, shape, precision):
    rows, d = shape
    E, G = normal(rows, d, dtype=WEIGHT), gram(d)
    G = G.bfloat16() if precision == "bf16" else G
    out = torch.empty(rows, d, device=DEVICE)
    product = WAYS[way]
    expected = cpu.product(E, G, precision=precision)
    if way == "bare":
        E, G = operands(E, G, precision)
    assert_equal_enough(product(E, G, precision=precision, out=out), expected, PRECISIONS[precision])
    least = cost.product(rows, d, E=E.element_size(), G=G.element_size())
    unit = precision
    if precision == "tf32x3":
        least, unit = replace(least, flops=3 * least.flops), "tf32"
    measure(benchmark, lambda: product(E, G, precision=precision, out=out), least, unit=unit)
