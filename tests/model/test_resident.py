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


def test_a_copy_of_a_block_leaves_out_what_lies_outside_of_it():
    """Though the block may refer to the whole model."""
    model, batches = drawn("diffusion", 1)
    block = model.singles[0]
    block.owners, block.own = [model], block.mlp[0]
    with resident(model, batches_of(batches, "calibration").batches[0], CPU) as opened:
        i = opened.names.index("singles.0")
        copied = opened.copy(i)
        assert copied.owners[0] is model
        assert copied is not block
        assert copied.own is copied.mlp[0] is not block.mlp[0]
