"""The expected memory of a solve is what it takes, where more is at work than a chunk of rows."""

import pytest
import torch
from helpers.memory import most_bytes

from sparsefw.estimate import Workload
from sparsefw.estimate.solve_memory import stage_bytes
from sparsefw.model import Placement
from sparsefw.model.shapes import LayerShape
from sparsefw.solver import PruneConfig, prune_layers
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT

ROWS, D = 4096, 256
# Room for the fewest rows.
SMALLEST = BYTES_PER_ENTRY * ROW_UNIT * D
WHOLE = dict(preset="paper", sparsity="layer:0.6", steps=2)
CASES = {
    "a saliency": (dict(method="wanda"), torch.float32),
    "a saliency of the whole matrix": (dict(method="ria"), torch.float32),
    # Among weights of a few bits, many are equally good.
    "a budget that is shared out": (dict(method="magnitude", sparsity="layer:0.6"), torch.bfloat16),
    "one problem": (WHOLE, torch.float32),
    "one problem with a line search": (WHOLE | dict(step_rule="line-search", keep_zeros=True), torch.bfloat16),
    "sparsegpt": (dict(method="sparsegpt"), torch.float32),
    "sparsegpt with groups": (dict(method="sparsegpt", sparsity="2:4", keep_zeros=True), torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_of_many_rows(case):
    options, dtype = CASES[case]
    config = PruneConfig(kernel="torch", reconstruct=0, **options)
    workload = Workload(8, (), 64, config, gpu=False, threads=1)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * D, D, generator=generator)
    layers, G = [("layer", torch.randn(ROWS, D, generator=generator).to(dtype))], X.T @ X

    def solve():
        list(prune_layers(layers, G, config.method, workload.config, config.backend, memory=SMALLEST))

    expected = stage_bytes(
        [LayerShape("layer", ROWS, D, "gram")], workload, Placement(1, solver=SMALLEST), config.method
    )
    assert 0.7 * expected < most_bytes(solve) <= 1.01 * expected
