"""A model in memory: what becomes of its tensors while its blocks are worked on, and at the end."""

import pytest
import torch
from helpers.stacks import drawn

from sparsefw import InputError
from sparsefw.data import batches_of
from sparsefw.model import resident

CPU = torch.device("cpu")


def test_a_tensor_without_a_place_is_refused():
    """Weights that are pruned and go nowhere would be missed by nobody."""
    model, batches = drawn("diffusion", 1)
    with resident(model, batches_of(batches, "calibration").batches[0], CPU) as opened:
        opened.open(0)
        tensors = opened.block_tensors(0)
        opened.close(0)
        tensors["doubles.0.gone.weight"] = torch.ones(1)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        for use in (opened.change, opened.open_as):
            with pytest.raises(InputError, match=r"doubles\.0\.gone\.weight: the model had this tensor"):
                use(0, tensors)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
