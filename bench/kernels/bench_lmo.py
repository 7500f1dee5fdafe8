"""lmo: the k best scores of every row, or n of every m; topk is `torch.topk` and a scatter."""

from functools import partial

import cost
import pytest
import torch
from bare import topk_lmo
from operations import DEVICE, budget, cases, measure, normal, ways

from sparsefw.kernels import cpu

WAYS = ways("lmo", topk=topk_lmo)


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_lmo(benchmark, way, shape, pattern):
    rows, d = shape
    k, group, d = budget(pattern, d)
    score = normal(rows, d)
    out = torch.empty(rows, d, dtype=torch.bool, device=DEVICE)
    # As in a solve: a check for NaN would wait for the GPU, and the wait would be timed. `topk` makes none.
    options = {} if way == "topk" else {"checked": False}
    lmo = partial(WAYS[way], score, k, group=group, out=out, **options)
    assert torch.equal(lmo(), cpu.lmo(score, k, group=group))
    measure(benchmark, lmo, cost.lmo(rows, d))
