"""The line of the log that says how many weights are removed."""

from types import SimpleNamespace

import pytest

from sparsefw.estimate.shapes import LayerShape
from sparsefw.report import log
from sparsefw.solver.config import PruneConfig


def shape_of(*blocks: list[tuple[int, ...]]) -> SimpleNamespace:
    """A model of these blocks, whose layers are (rows, d) or (rows, d, experts)."""

    def layer(rows: int, d: int, experts: int = 0) -> LayerShape:
        return LayerShape("", rows, d, "", experts)

    return SimpleNamespace(blocks=[SimpleNamespace(layers=[layer(*size) for size in block]) for block in blocks])


# The layers of SmolLM2-135M: 106,168,320 weights; and a selection, with a layer of two experts.
SMOL = shape_of(*[[(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]] * 30)
SELECTED, WHOLE = shape_of([(6, 10)], [], [(3, 10)]), shape_of([(6, 10)], [(5, 12)], [(3, 10, 2), (5, 10)])


@pytest.mark.parametrize(
    ("config", "selected", "whole", "words"),
    [
        ({}, SMOL, SMOL, ["59.91%"]),
        ({"method": "sparsegpt", "compare": ("wanda",)}, SMOL, SMOL, ["60.00%", "59.91%"]),
        ({"ignore": "x"}, SELECTED, WHOLE, ["60.00% of 90 weights", "90 of 230"]),
    ],
)
def test_the_line_of_sparsity(config, selected, whole, words):
    line = log.sparsity_line(PruneConfig(**config), selected, whole)
    assert all(word in line for word in words)
