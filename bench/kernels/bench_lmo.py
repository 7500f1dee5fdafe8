"""lmo: the k best scores of every row, or n of every m; topk is `torch.topk` and a scatter."""

import pytest
import torch
from bare import topk_lmo
from operations import DEVICE, budget, cases, measure, normal, ways

from sparsefw.kernels import cost, cpu

WAYS = ways("lmo", topk=topk_lmo)


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_lmo(benchmark, way, shape, pattern):
    rows, d = shape
    k, group, d = budget(pattern, d)
    score = normal(rows, d)
    out = torch.empty(rows, d, dtype=torch.bool, device=DEVICE)
    lmo = WAYS[way]
    assert torch.equal(lmo(score, k, group=group, out=out), cpu.lmo(score, k, group=group))
    measure(benchmark, lambda: lmo(score, k, group=group, out=out), cost.lmo(rows, d))
