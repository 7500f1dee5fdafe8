"""The line of the log that says how many weights are removed."""

from types import SimpleNamespace

import pytest

from sparsefw.report import log
from sparsefw.solver.config import PruneConfig


def shape_of(*blocks: list[tuple[int, ...]]) -> SimpleNamespace:
    """A model of these blocks, whose layers are (rows, d) or (rows, d, experts)."""

    def layer(rows: int, d: int, experts: int = 0) -> SimpleNamespace:
        return SimpleNamespace(rows=rows, d=d, experts=experts)

    return SimpleNamespace(blocks=[SimpleNamespace(layers=[layer(*size) for size in block]) for block in blocks])


# The layers of SmolLM2-135M: 106,168,320 weights.
SMOL = shape_of(*[[(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]] * 30)


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        ({}, ["59.91%"]),
        ({"sparsity": "2:4"}, ["50.00%"]),
        ({"method": "sparsegpt", "compare": ("wanda",)}, ["60.00%", "59.91%"]),
    ],
)
def test_sparsity_of_patterns_and_methods(config, shares):
    line = log.sparsity_line(PruneConfig(**config), SMOL, SMOL)
    assert [word for word in line.split() if word.endswith("%")] == shares


def test_sparsity_of_a_selection_with_experts():
    """A layer of experts counts as one matrix for each expert."""
    selected, whole = shape_of([(6, 10)], [], [(3, 10)]), shape_of([(6, 10)], [(5, 12)], [(3, 10, 2), (5, 10)])
    line = log.sparsity_line(PruneConfig(ignore="x"), selected, whole)
    assert "60.00% of 90 weights" in line
    assert "90 of 230" in line
