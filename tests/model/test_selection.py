"""Layers may be left out: the others are found, staged and measured as if those were no layers."""

import pytest
import torch
from helpers.damaged import Block, check_moves_on, damaged_module, damaged_pair, measured_stages, whole_runs
from helpers.families import first_is_fast, save_model
from torch import nn


def without(*left_out):
    return lambda name: name not in left_out


def measured_in_stages(pair, selected):
    """Names of the layers, Gram and cross matrices, and names left out, over all stages of a damaged block."""
    runs, layers, grams, crosses, ignored = whole_runs(pair), [], {}, {}, set()
    for captured in measured_stages(pair, selected, loss=0):
        layers += [layer.name for layer in captured.layers]
        grams |= {layer.name: captured.grams[layer.gram] for layer in captured.layers}
        assert set(captured.grams) == {layer.gram for layer in captured.layers}
        crosses |= captured.crosses
        ignored |= set(captured.ignored)
    # Both models have moved on to the end of the block, whichever layers are left out.
    check_moves_on(pair, runs)
    return layers, grams, crosses, ignored


# Family, and the layers left out: the first reader of an input; a whole stage and the last layer of a block; experts.
LEFT_OUT = [
    ("mixtral", ["mlp.experts.gate_up_proj[0]", *(f"mlp.experts.down_proj[{e}]" for e in (0, 1, 2))]),
    ("llama", [*(f"self_attn.{part}_proj.weight" for part in "qkv"), "mlp.down_proj.weight"]),
    ("llama", ["self_attn.q_proj.weight"]),
]


@pytest.mark.parametrize(("family", "left_out"), first_is_fast(LEFT_OUT, 2))
def test_layers_that_stay_are_measured_as_without_selection(family, left_out, tmp_path):
    folder = save_model(tmp_path, family)
    everything = measured_in_stages(damaged_pair(folder), without())
    assert everything[3] == set()
    assert set(left_out) < set(everything[0])
    layers, grams, crosses, ignored = measured_in_stages(damaged_pair(folder), without(*left_out))
    assert set(layers) == set(everything[0]) - set(left_out)
    assert len(layers) == len(set(layers))
    assert grams.keys() == everything[1].keys() - set(left_out)
    assert crosses.keys() == everything[2].keys() - set(left_out)
    for name, G in grams.items():
        assert torch.equal(G, everything[1][name]), name
    for name, cross in crosses.items():
        assert cross.of == everything[2][name].of
        assert torch.equal(cross.matrix, everything[2][name].matrix), name
    assert ignored <= set(left_out)


def test_experts_in_a_list_of_modules_of_which_some_have_lost_their_first_layer():
    """All experts stay in one stage, and no layer is seen twice."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x):
            return self.w2(self.w1(x).relu() * self.w3(x))

    def forward(block, x):
        return x + sum(expert(x[n::3]).sum(0) for n, expert in enumerate(block.experts))

    block = Block(forward)
    block.experts = nn.ModuleList(Expert() for _ in range(3))
    pair = damaged_module(block, [torch.randn(21, 8)])
    x, selected, seen = pair.pruned.hidden[0], without("experts.1.w1.weight", "experts.2.w3.weight"), []
    for captured in measured_stages(pair, selected, keep=False, loss=0):
        seen.append({layer.name for layer in captured.layers})
        for layer in captured.layers:
            if "w2" not in layer.name:
                n = int(layer.name.split(".")[1])
                torch.testing.assert_close(captured.grams[layer.gram], x[n::3].T @ x[n::3])
    assert seen == [
        {"experts.0.w1.weight", "experts.0.w3.weight", "experts.1.w3.weight", "experts.2.w1.weight"},
        {f"experts.{n}.w2.weight" for n in range(3)},
    ]


def test_a_second_layer_of_a_module_in_a_list_is_no_layer_of_the_first_ones_stage():
    """As in Zamba2, whose adapters are pairs of layers in a list: indices alone do not tell the two apart."""

    block = Block(lambda block, x: block.a(x) + block.adapters[0](x))
    block.adapters = nn.ModuleList([nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))])
    pair, seen = damaged_module(block, [torch.randn(21, 8)]), []
    for captured in measured_stages(pair, keep=False):
        seen.append([layer.name for layer in captured.layers])
    assert seen == [["a.weight", "adapters.0.0.weight"], ["adapters.0.1.weight"]]
