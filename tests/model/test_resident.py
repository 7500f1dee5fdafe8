"""A model in memory: what becomes of its tensors while its blocks are worked on, and at the end."""

import torch
from helpers.stacks import drawn

from sparsefw.data.batches import batches_of
from sparsefw.model import resident

CPU = torch.device("cpu")


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
