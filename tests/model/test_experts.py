"""Which numbered modules of a block may be experts, and what becomes of those that are just numbered."""

import pytest
import torch
import transformers
from helpers.stacks import VOCABULARY, random_ids
from torch import nn

from sparsefw import prune
from sparsefw.data import batches_of
from sparsefw.model import resident
from sparsefw.model.layers import experts_of, is_expert, kind_of
from sparsefw.model.shape_of import shape_of_resident

QUICK = dict(kernel="torch", steps=3, refit=2, rounds=0, reconstruct=0, sparsity="0.5")
CPU = torch.device("cpu")


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
        (nn.ModuleDict({"0": linear(), "1": linear(), "shared": linear()}), ["0", "1"]),
        (nn.ModuleList([linear(), linear(), nn.LSTM(8, 8)]), ["0", "1"]),
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


def test_names_without_an_experts_index():
    experts = frozenset({"mlp.0", "mlp.1", "mlp.1.inner.2"})
    kinds = {
        "mlp.0.0.weight": "mlp.*.0.weight",
        "mlp.1.inner.2.weight": "mlp.*.inner.*.weight",
        "mlp.1.inner.3.weight": "mlp.*.inner.3.weight",
        "mlp.2.weight": "mlp.2.weight",
        "down_proj[12]": "down_proj*",
    }
    assert {name: kind_of(name, experts) for name in kinds} == kinds
    assert [is_expert(name, experts) for name in kinds] == [True, True, True, False, True]


def t5():
    """Attention and MLP of a block are numbered parts of it."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


def test_parts_with_numbers_have_the_dense_models_outputs_as_targets():
    batches = [{"input_ids": random_ids(2, 9), "labels": random_ids(2, 5)} for _ in range(3)]
    result = prune(t5(), calibration=batches, **QUICK)
    assert len(result.layers) == 2 * 6 + 2 * 10
    assert {layer.target for layer in result.layers} == {"dense"}


@pytest.mark.parametrize(("experts", "counts"), [(3, [3, 3]), (1, [0, 0])])
def test_the_shape_counts_experts_of_a_list(experts, counts):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(linear(), nn.ReLU(), linear()) for _ in range(experts))

        def forward(self, x):
            parts = x.chunk(experts)
            return x + torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Experts() for _ in range(2))

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    batch = batches_of([torch.randn(6, 8)], "calibration").batches[0]
    with resident(Stack(), batch, CPU) as opened:
        shape, _ = shape_of_resident(opened, batch)
    assert [layer.experts for layer in shape.blocks[0].layers] == counts
    assert len(shape.layer_names) == 2 * 2 * experts
    some = shape.selected(lambda name: "experts.0" in name)
    assert [layer.experts for layer in some.blocks[0].layers] == [min(1, count) for count in counts]
