"""The lines of the log."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.pages import layer, report_of_run

from sparsefw.report import log
from sparsefw.report.content import Reconstruction
from sparsefw.solver.config import PruneConfig


def shape_of(*blocks: list[tuple[int, ...]]) -> SimpleNamespace:
    """A model of these blocks, whose layers are (rows, d) or (rows, d, experts)."""

    def layer(rows: int, d: int, experts: int = 0) -> SimpleNamespace:
        return SimpleNamespace(rows=rows, d=d, experts=experts)

    return SimpleNamespace(blocks=[SimpleNamespace(layers=[layer(*size) for size in block]) for block in blocks])


# The layers of SmolLM2-135M: 106,168,320 weights.
SMOL = shape_of(*[[(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]] * 30)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "59.91% of 106,168,320 weights"),
        ({"sparsity": "layer:0.6"}, "60.00% of 106,168,320 weights"),
        ({"sparsity": "2:4"}, "50.00% of 106,168,320 weights"),
        ({"compare": ("wanda", "sparsegpt")}, "59.91% of 106,168,320 weights; sparsegpt: 60.00%"),
        ({"method": "sparsegpt", "compare": ("wanda",)}, "60.00% of 106,168,320 weights; wanda: 59.91%"),
    ],
)
def test_sparsity_of_patterns_and_methods(config, message):
    assert log.sparsity_line(PruneConfig(**config), SMOL, SMOL) == f"sparsity: {message}"


def test_sparsity_of_a_selection_with_experts():
    """A layer of experts counts as one matrix for each expert."""
    selected, whole = shape_of([(6, 10)], [], [(3, 10)]), shape_of([(6, 10)], [(5, 12)], [(3, 10, 2), (5, 10)])
    line = log.sparsity_line(PruneConfig(ignore="x"), selected, whole)
    assert line.endswith("60.00% of 90 weights; selected: 90 of 230 prunable weights (39.13%)")


LONG = "block_sparse_moe.experts.127.shared_gate.w1"


@pytest.mark.parametrize(
    ("block", "name", "shown"),
    [
        ("model.language_model.layers.60", "mlp.experts.up_proj[255]", "layers.60.mlp.experts.up_proj[255]"),
        ("0", "q", "0.q"),
        ("model.vision_tower.layers.102", LONG, "layers.102.b..experts.127.shared_gate.w1"),
    ],
)
def test_rows_fit_a_terminal(block, name, shown):
    """The longest cells of every column, under the names of the columns; the end of a long name is seen."""
    result = layer(f"{block}.{name}.weight", "magnitude", 12.345, 12.345, (151936, 16384))
    rows = log.layer_header(), log.layer_row(replace(result, steps=2000, seconds=3600.0), block)
    assert {len(row) for row in rows} == {99}
    assert rows[1].split()[:3] == [shown, "151936x16384", "magnitude"]


def test_reconstruction_line():
    """Blocks that were put back have gained nothing; those that were not reconstructed do not count."""
    report = report_of_run()
    assert log.reconstruction_line(report) == ""
    found = Reconstruction(0.5, 0.25, 18, False), None, Reconstruction(0.5, math.nan, 18, True)
    blocks = [replace(block, reconstruction=x) for block, x in zip(report.blocks, found, strict=True)]
    line = log.reconstruction_line(replace(report, blocks=blocks))
    assert "2 blocks, loss on held-out windows x 0.750 in the mean; 1 put back" in line
