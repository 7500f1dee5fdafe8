"""The line of the log that says how many weights are removed."""

from types import SimpleNamespace

from sparsefw.estimate.shapes import LayerShape
from sparsefw.report import log
from sparsefw.solver.config import PruneConfig


def shape_of(*layers: tuple[int, ...]) -> SimpleNamespace:
    """A model of one block, whose layers are (rows, d) or (rows, d, experts)."""
    layers = [LayerShape("", rows, d, "", *experts) for rows, d, *experts in layers]
    return SimpleNamespace(blocks=[SimpleNamespace(layers=layers)])


def test_the_line_of_sparsity():
    """A row of 576 loses 345 weights, and a whole matrix 60 %; some layers are selected, and one is of experts."""
    config = PruneConfig(method="sparsegpt", compare=("wanda",), ignore="x")
    line = log.sparsity_line(config, shape_of((10, 576)), shape_of((10, 576), (5, 12), (3, 10, 2)))
    assert line == (
        "sparsity: 60.00% of 5,760 weights; wanda: 59.90%; selected: 5,760 of 5,880 prunable weights (97.96%)"
    )
