"""The roofs that other benchmarks are compared with: a device copy, and square matrix products of the library."""

import cost
import pytest
import torch
from bare import bare_product
from cost import Cost
from operations import DEVICE, GPU, measure, normal

COPIED = (1 << 30) if GPU else (1 << 16)
D = 8192 if GPU else 128


def test_copy(benchmark):
    source = torch.ones(COPIED, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    # Read once, written once.
    measure(benchmark, lambda: target.copy_(source), Cost(0, 2 * COPIED))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_matmul(benchmark, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    E, G = normal(D, D, dtype=dtype), normal(D, D, dtype=dtype, seed=1)
    least = cost.product(D, D, E=E.itemsize, G=G.itemsize)
    measure(benchmark, lambda: bare_product(E, G, precision=precision), least, unit=precision)
