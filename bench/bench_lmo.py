"""lmo: the k best scores of every row, or n of every m, reference against Triton."""

import pytest
import torch
from operations import DEVICE, OPS, SHAPES, budget, measure, normal

from sparsefw.kernels import cost, reference


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", OPS)
def test_lmo(benchmark, kernel, shape, pattern):
    rows, d = shape
    k, group, d = budget(pattern, d)
    score = normal(rows, d)
    out = torch.empty(rows, d, dtype=torch.bool, device=DEVICE)
    lmo = OPS[kernel].lmo
    assert torch.equal(lmo(score, k, group=group, out=out), reference.lmo(score, k, group=group))
    measure(benchmark, lambda: lmo(score, k, group=group, out=out), cost.lmo(rows, d))
