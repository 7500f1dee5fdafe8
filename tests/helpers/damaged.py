"""A block of a tiny model in two states: dense, and as if blocks and layers before had been pruned."""

import copy

import torch
from helpers.families import TOKENS
from helpers.kernel_inputs import DEVICE

from sparsefw import checkpoint
from sparsefw.model import StreamedModel, embed


def damaged_pair(folder, tokens=TOKENS):
    """The first block damaged and dense, a function that runs a micro-batch through each, and the batches' numbers."""
    model = StreamedModel(checkpoint.inspect(folder), DEVICE)
    states = embed(model, tokens, 2)
    block = model.open(0)
    dense, lossy = copy.deepcopy(block), states.fork()
    # As if blocks before had been pruned, and the first layers of this one.
    lossy.hidden = [h * (torch.arange(h.shape[-1]) % 3 > 0) for h in lossy.hidden]
    first = next(p for name, p in block.named_parameters() if p.dim() == 2)
    first.data[:, ::2] = 0
    runs = (lambda j: lossy.output(0, j)), (lambda j: states.output(0, j, dense))
    return block, dense, *runs, range(len(states))
