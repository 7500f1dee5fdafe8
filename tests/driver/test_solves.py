"""Which layers are solved together."""

import pytest
import torch

from sparsefw.driver.solves import find_solves
from sparsefw.model.layers import Layer
from sparsefw.model.measure import Captured
from sparsefw.ranks import ALONE, Ranks
from sparsefw.solver.config import PruneConfig


@pytest.mark.parametrize("ranks", [ALONE, Ranks(1, 2)], ids=["alone", "shared"])
def test_layers_of_one_input_and_one_dtype(ranks):
    """Ranks share the rows of a stack, and a stack has one dtype."""
    forms = {
        "q": ("q", torch.bfloat16),
        "k": ("q", torch.float32),
        "v": ("q", torch.bfloat16),
        "o": ("o", torch.float32),
    }
    layers = [Layer(name, torch.ones(3, 4, dtype=dtype), gram) for name, (gram, dtype) in forms.items()]
    captured = Captured(layers, {}, {}, [])
    solves = find_solves(captured, "sparsefw", PruneConfig(kernel="torch"), ranks, frozenset())
    assert [[layer.name for layer in solve.layers] for solve in solves] == [["q", "v"], ["k"], ["o"]]
    assert [solve.gram for solve in solves] == ["q", "q", "o"]
