"""mirror_lower: the lower triangle of G copied to the upper one."""

import cost
import pytest
import torch
from operations import SHAPES, cases, measure, normal, ways

from sparsefw.kernels import cpu

WAYS = ways("mirror_lower")


@pytest.mark.parametrize(("way", "d"), cases(WAYS, sorted({d for _, d in SHAPES})))
def test_mirror_lower(benchmark, way, d):
    G = normal(d, d)
    mirror = WAYS[way]
    assert torch.equal(mirror(G.clone()), cpu.mirror_lower(G.clone()))
    measure(benchmark, lambda: mirror(G), cost.mirror_lower(d))
