"""Matrices that decide are found by what the forward does with their outputs, and no other layer is taken for one."""

import pytest
import torch
from torch import nn

from sparsefw.model.experts import find_no_layers
from sparsefw.model.find_layers import record_block

TOKENS, D, E = 6, 8, 4


class Block(nn.Module):
    """A block with layers under names that tell nothing, a gate `g` (E, D) among them, and a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.g, self.h, self.one = (nn.Linear(D, rows, bias=False) for rows in (E, E, 1))
        self.input_router, self.of_logits = nn.Linear(D, E, bias=False), nn.Linear(E, 3, bias=False)
        self._forward = forward
        self.requires_grad_(False)

    def forward(self, x):
        return self._forward(self, x)


def combined(x, weights, indices):
    """A sum of multiples of x, as of experts that do nothing."""
    return ((weights.sum(-1, keepdim=True) + 0 * indices.sum(-1, keepdim=True)) * x).to(x.dtype)


def softmax_and_topk(b, x):
    return b.a(combined(x, *b.g(x).float().softmax(-1).topk(2, -1)))


def sigmoid_bias_and_groups(b, x):
    """As in DeepSeek-V3: groups of experts are chosen first, then experts in them."""
    scores = b.g(x).sigmoid()
    groups = (scores + 0.1).view(TOKENS, 2, 2).topk(1, -1).values.sum(-1).topk(1, -1).indices
    mask = torch.zeros(TOKENS, 2).scatter(1, groups, 1).repeat_interleave(2, 1)
    chosen = scores.masked_fill(mask == 0, 0).topk(2, -1).indices
    return b.a(combined(x, scores.gather(1, chosen), chosen))


def indices_of_the_largest(b, x):
    values, indices = b.g(x).softmax(-1).max(-1, keepdim=True)
    return b.a(combined(x, values, indices))


def a_part_of_the_outputs(b, x):
    """Shared experts have weights of the same gate, and are not chosen."""
    logits = b.g(x)
    routed, shared = logits[:, :3], logits[:, 3:]
    return b.a(combined(x, *routed.topk(2, -1))) * shared


def in_place(b, x):
    logits = b.g(x)
    logits.div_(3)
    logits += 1
    return b.a(combined(x, *logits.topk(2, -1)))


def normed(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def inner_layers(b, x):
    """Their outputs go into further layers of the router, and nowhere else."""
    states = b.b(x) + 1
    return b.a(combined(x, *b.g(b.c(normed(states)).relu()).topk(2, -1))), states.clone()


def read_by_an_expert(b, x):
    """Of two layers before a router, the second is read by an expert, in the order of the tokens that it is sent."""
    h = b.b(x)
    order = b.g(h.relu()).topk(1, -1).indices.flatten().argsort()
    return b.a(h.repeat(2, 1)[order]) + b.c(x)[:TOKENS]


def returned_in_part(b, x):
    """The hidden states are written to piece by piece, in a part of their memory."""
    h, out = b.b(x), torch.zeros(TOKENS, D)
    out[:2].copy_(h[:2] * b.g(h).topk(1, -1).values[:2])
    return out + b.a(x) + b.c(x)


def read_by_attention(b, x):
    h = b.b(x)
    return b.a(combined(x, *b.g(h).topk(2, -1))) + (h @ h.T).softmax(-1) @ b.c(x)


def in_fp32(b, x):
    """As the coefficients of residual streams. In fp32, where nothing is converted, it is the same matrix."""
    return b.a(x) * nn.functional.linear(x.float(), b.g.weight.float()).sigmoid().sum(-1, keepdim=True).to(x.dtype)


def gate_of_one_number(b, x):
    return b.a(x) * b.one(x).sigmoid() + b.g(x).sum()


def coefficients(b, x):
    """As in AltUp: a second matrix reads nothing but what the router puts out."""
    return b.a(x) * b.of_logits(b.input_router(x).tanh()).sum(-1, keepdim=True) + b.g(x).sum()


def reads_more_than_a_routers_outputs(b, x):
    logits = b.g(x)
    return b.a(combined(x, *logits.topk(2, -1))) * b.of_logits(logits + b.h(x)).sum(-1, keepdim=True)


def gate_of_heads(b, x):
    """A gate for each of E heads, and attention."""
    heads = (b.a(x).view(TOKENS, E, -1) * b.g(x).sigmoid()[..., None]).flatten(1)
    return (heads @ x.T).softmax(-1) @ x


def tokens_are_chosen(b, x):
    """As in sparse attention: what is chosen from are products of two tokens."""
    keys = (b.a(x) @ x.T).topk(3, -1).indices
    return x[keys].mean(1) + b.g(x).sum()


def scores_are_added_up(b, x):
    """The weights of heads in a sparse attention's indexer: each entry that is chosen from is a sum over all heads."""
    scores = (torch.ones(TOKENS, E, TOKENS) * b.g(x)[..., None]).sum(1)
    return b.a(x)[scores.topk(3, -1).indices].mean(1)


def tokens_taken_by_indices(b, x):
    tokens = torch.tensor([4, 2])[:, None].expand(2, D)
    return x + b.a(x).gather(0, tokens).sum(0) + b.g(x).sum()


def residual(b, x):
    """A stream that layers have written to reaches a router through its own matrix only."""
    h = x + b.a(x)
    return h + combined(h, *nn.functional.linear(h, torch.ones(D, D, dtype=x.dtype)).topk(2, -1)) + b.g(x).sum()


def shares_one_of_its_inputs(b, x):
    """As in Zaya. One that has its inputs for itself is a layer, and its Gram matrix is that of all of them."""
    return b.a(x) + b.b(x) + b.b(x.flip(0)) + b.c(x.tanh()) + b.c(x.sin()) + b.g(x).sum()


# By forward: the matrices that stay dense.
DENSE = {
    softmax_and_topk: "g",
    sigmoid_bias_and_groups: "g",
    indices_of_the_largest: "g",
    a_part_of_the_outputs: "g",
    in_place: "g",
    inner_layers: "b c g",
    read_by_an_expert: "g",
    returned_in_part: "g",
    read_by_attention: "g",
    in_fp32: "g",
    gate_of_one_number: "one",
    coefficients: "input_router of_logits",
    reads_more_than_a_routers_outputs: "g",
    gate_of_heads: "",
    tokens_are_chosen: "",
    scores_are_added_up: "",
    tokens_taken_by_indices: "",
    residual: "",
    shares_one_of_its_inputs: "b",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forward", DENSE, ids=lambda forward: forward.__name__)
def test_matrices_that_stay_dense(forward, dtype):
    block = Block(forward).to(dtype)
    found = find_no_layers(record_block(block, block, torch.randn(TOKENS, D, dtype=dtype))[0])
    assert found == {f"{name}.weight" for name in DENSE[forward].split()}
