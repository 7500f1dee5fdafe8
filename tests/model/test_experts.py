"""Experts of a mixture, and numbered parts that are alike and that every token goes through, one after the other."""

import pytest
import torch
from helpers.families import experts_like
from helpers.tensors import assert_equal
from torch import nn

from sparsefw.data.batches import batches_of
from sparsefw.estimate.profile import shape_of_resident
from sparsefw.model.block_model import resident
from sparsefw.model.experts import experts_of, without_sequential_parts
from sparsefw.model.find_layers import record_block
from sparsefw.model.settings import ONE_BY_ONE

CPU = torch.device("cpu")
D, E, TOKENS = 8, 3, 16


class Router(nn.Sequential):
    """A Sequential by name only: it sends tokens to one of its modules."""

    def forward(self, x):
        return self[0](x) if x.sum() > 0 else self[1](x)


def linear(*sizes):
    return nn.Linear(*sizes or (8, 8))


@pytest.mark.parametrize(
    ("module", "experts"),
    [
        (nn.ModuleList([linear(), linear()]), ["0", "1"]),
        # Experts may be of several sizes, and some of no weights.
        (nn.ModuleList([linear(8, 4), linear(8, 6), nn.Identity()]), ["0", "1"]),
        (Router(linear(), linear()), ["0", "1"]),
        (nn.ModuleList([nn.Sequential(linear(), nn.ReLU(), linear()) for _ in range(2)]), ["0", "1"]),
        (nn.Sequential(linear(), nn.ReLU(), linear()), []),
        (nn.ModuleList([linear(), nn.Dropout()]), []),
        (nn.ModuleList([nn.MultiheadAttention(8, 2), linear()]), []),
    ],
)
def test_experts_are_alike_and_no_sequence(module, experts):
    assert experts_of(module) == set(experts)
    block = nn.Module()
    block.mlp = module
    assert experts_of(block) == {f"mlp.{expert}" for expert in experts}


def expert():
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))


class Parts(nn.Module):
    """A block with numbered parts and a router, whose forward is given."""

    def __init__(self, forward, part=expert):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(part() for _ in range(E))
        self.router = nn.Linear(D, E)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)

    def chosen(self, x):
        """The part of each token."""
        return self.router(x).argmax(-1)


def by_index(block, x):
    chosen, out = block.chosen(x), torch.zeros_like(x)
    for e, part in enumerate(block.parts):
        tokens = torch.where(chosen == e)[0]
        out.index_add_(0, tokens, part(x[tokens]))
    return x + out


def twice(block, x):
    """The experts of the second round read what those of the first have returned."""
    return by_index(block, by_index(block, x))


def sorted_in_place(block, x):
    """Tokens lie in one tensor, those of each expert together, and what it returns takes their place."""
    chosen = block.chosen(x)
    order = chosen.argsort()
    x, begin = x[order], 0
    for e, part in enumerate(block.parts):
        end = begin + int((chosen == e).sum())
        x[begin:end] = part(x[begin:end])
        begin = end
    return x[order.argsort()]


def chosen_from_all(block, x):
    chosen = block.chosen(x)
    for e, part in enumerate(block.parts):
        x = torch.where((chosen == e)[:, None], part(x), x)
    return x


class WithSum(nn.Module):
    """An expert that adds to a sum, such as that of a loss, which goes from expert to expert."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, total):
        out = self.linear(x)
        return out, total + out.square().mean()


def with_sum(block, x):
    chosen, out, total = block.chosen(x), torch.zeros_like(x), torch.zeros(())
    for e, part in enumerate(block.parts):
        tokens = torch.where(chosen == e)[0]
        made, total = part(x[tokens], total)
        out.index_add_(0, tokens, made)
    return x + out


def in_turn(block, x):
    for part in block.parts:
        x = x + part(x)
    return x


MIXTURES = [by_index, twice, sorted_in_place, chosen_from_all, with_sum]


def found(block):
    x = torch.randn(TOKENS, D)
    experts = experts_of(block)
    return without_sequential_parts(experts, record_block(block, block, x, modules=experts)[0])


@pytest.mark.parametrize("forward", MIXTURES)
def test_experts_of_a_mixture(forward):
    block = Parts(forward, WithSum if forward is with_sum else expert)
    assert found(block) == experts_of(block) == {f"parts.{e}" for e in range(E)}


def test_parts_in_turn_are_no_experts_but_their_parts_may_be():
    assert found(Parts(in_turn)) == set()
    block = Parts(in_turn, lambda: Parts(by_index))
    assert found(block) == {f"parts.{i}.parts.{e}" for i in range(E) for e in range(E)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_the_shape_counts_experts_of_a_list():
    def each_a_part(block, x):
        return x + torch.cat([part(tokens) for part, tokens in zip(block.parts, x.chunk(E), strict=True)])

    batch = batches_of([torch.randn(6, D)], "calibration").batches[0]
    with resident(nn.Sequential(Parts(each_a_part), Parts(each_a_part)), batch, CPU) as opened:
        shape, _ = shape_of_resident(opened, batch)
    assert [layer.experts for layer in shape.blocks[0].layers] == [E, E]
    assert len(shape.layer_names) == 2 * 2 * E
    some = shape.selected(lambda name: "parts.0" in name)
    assert [layer.experts for layer in some.blocks[0].layers] == [1, 1]


# The last two have transposed weights, and the last one biases.
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "aria_text", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_one_by_one_give_the_bits_of_transformers_own_loop(family, tokens):
    """And gradients. Not all experts have tokens where there is one."""
    found = []
    for name in ("eager", ONE_BY_ONE):
        experts, (hidden, numbers, weights) = experts_like(family, tokens)
        experts.config._experts_implementation = name
        leaves = [hidden.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
        out = experts(hidden, numbers, weights)
        out.square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    assert_equal(*found)
