"""Layers may be left out: the others are found, staged and measured as if those were no layers."""

import functools

import pytest
import torch
from helpers.damaged import damaged_pair
from helpers.families import save_model
from torch import nn

from sparsefw.kernels.backend import TORCH
from sparsefw.model.layers import capture, dense_outputs, find_layers, stages


def without(*left_out):
    return lambda name: name not in left_out


def captured_in_stages(pair, selected):
    """Names of the layers, Gram and cross matrices, and names left out, over all stages of a damaged block."""
    block, dense, run, run_dense, batches = pair
    layers, grams, crosses, ignored = [], {}, {}, set()
    for stage in stages(block, functools.partial(run, 0), selected):
        put_out = dense_outputs(dense, run_dense, stage)
        captured = capture(block, run, batches, backend=TORCH, selected=selected, stage=stage, dense=put_out)
        layers += [layer.name for layer in captured.layers]
        grams |= {layer.name: captured.grams[layer.gram] for layer in captured.layers}
        assert set(captured.grams) == {layer.gram for layer in captured.layers}
        crosses |= captured.crosses
        ignored |= set(captured.ignored)
    return layers, grams, crosses, ignored


def same(matrices, expected, left_out):
    """Assert that matrices of the layers that are not left out equal those without selection, bit for bit."""
    assert matrices.keys() == expected.keys() - set(left_out)
    for name, matrix in matrices.items():
        assert torch.equal(matrix, expected[name]), name


# Family, and the layers left out: the first, one in the middle and the last reader of an input; the last layer of a
# block; a whole stage; one expert; all experts but one.
LEFT_OUT = [
    ("llama", ["self_attn.q_proj.weight"]),
    ("llama", ["self_attn.k_proj.weight"]),
    ("llama", ["self_attn.v_proj.weight"]),
    ("llama", ["mlp.down_proj.weight"]),
    ("llama", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
    ("llama", [*(f"self_attn.{part}_proj.weight" for part in "qkv"), "mlp.down_proj.weight"]),
    ("gpt_neox", ["mlp.dense_h_to_4h.weight"]),
    ("mixtral", ["mlp.experts.down_proj[3]"]),
    ("mixtral", ["mlp.experts.gate_up_proj[0]", *(f"mlp.experts.down_proj[{e}]" for e in (0, 1, 2))]),
]
IDS = [f"{family}-{'+'.join(names)}" for family, names in LEFT_OUT]


@pytest.mark.parametrize(("family", "left_out"), LEFT_OUT, ids=IDS)
def test_layers_that_stay_are_measured_as_without_selection(family, left_out, tmp_path):
    pair = damaged_pair(save_model(tmp_path, family))
    everything = captured_in_stages(pair, without())
    assert everything[3] == set()
    assert set(left_out) < set(everything[0])
    layers, grams, crosses, ignored = captured_in_stages(pair, without(*left_out))
    assert set(layers) == set(everything[0]) - set(left_out)
    assert len(layers) == len(set(layers))
    same(grams, everything[1], left_out)
    same(crosses, {name: B for name, B in everything[2].items() if name in layers}, left_out)
    assert ignored <= set(left_out)


@pytest.mark.parametrize(("family", "left_out"), LEFT_OUT, ids=IDS)
def test_the_whole_block_at_once(family, left_out, tmp_path):
    block, _, run, _, batches = damaged_pair(save_model(tmp_path, family))
    everything = capture(block, run, batches, backend=TORCH)
    captured = capture(block, run, batches, backend=TORCH, selected=without(*left_out))
    assert [layer.name for layer in captured.layers] == [
        layer.name for layer in everything.layers if layer.name not in left_out
    ]
    assert set(captured.ignored) == set(left_out)
    assert set(captured.grams) == {layer.gram for layer in captured.layers}
    for name, G in captured.grams.items():
        assert torch.equal(G, everything.grams[name])


def test_the_last_layer_that_stays_makes_up_for_those_behind_it(tmp_path):
    """In gpt_neox two layers write to one sum. With the second left out, the first is compared with the whole sum."""
    block, _, run, run_dense, batches = damaged_pair(save_model(tmp_path, "gpt_neox"))
    inputs = []
    hook = block.attention.dense.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    gaps = [run_dense(j) - run(j) for j in batches]
    hook.remove()
    selected = without("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight")
    last = stages(block, functools.partial(run, 0), selected)[-1]
    assert (last.key, last.final, last.moves) == ("attention.dense.weight", True, False)
    moved = [run_dense(j) for j in batches]
    captured = capture(
        block,
        run,
        batches,
        backend=TORCH,
        selected=selected,
        stage=last,
        dense=lambda j: lambda name: moved[j].reshape(-1, moved[j].shape[-1]),
    )
    gap, X = (torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors]).double() for tensors in (gaps, inputs))
    B = captured.crosses["attention.dense.weight"].double()
    torch.testing.assert_close(B, gap.T @ X, rtol=1e-3, atol=1e-5 * B.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_all_layers_of_a_block_left_out(family, tmp_path):
    block, _, run, _, batches = damaged_pair(save_model(tmp_path, family))
    names = [layer.name for layer in capture(block, run, batches, backend=TORCH).layers]
    captured = capture(block, run, batches, backend=TORCH, selected=lambda name: False)
    assert (captured.layers, captured.grams, captured.crosses) == ([], {}, {})
    # The router is no layer, whatever is selected.
    assert captured.ignored == names
    assert stages(block, functools.partial(run, 0), lambda name: False) == []
    assert find_layers(block, functools.partial(run, 0), lambda name: False) == []


@pytest.mark.parametrize(
    ("left_out", "moves"),
    [
        ([], [False, False, True, False]),
        # The outputs of gate and up are not the block's.
        (["mlp.down_proj.weight"], [False, False, True]),
        (["mlp.gate_proj.weight"], [False, False, True, False]),
        (["mlp.gate_proj.weight", "mlp.up_proj.weight"], [False, True, False]),
        # A single stage is the final one, and moves the dense model on in any case.
        ([f"self_attn.{p}_proj.weight" for p in "qkvo"] + ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [True]),
    ],
    ids=["nothing", "down", "gate", "gate+up", "all but down"],
)
def test_one_stage_moves_the_dense_model_on_to_the_end_of_the_block(left_out, moves, tmp_path):
    block, dense, run, run_dense, batches = damaged_pair(save_model(tmp_path, "llama"))
    order = stages(block, functools.partial(run, 0), without(*left_out))
    assert [stage.moves for stage in order] == moves
    assert [stage.final for stage in order] == [False] * (len(order) - 1) + [True]
    (moving,) = [stage for stage in order if stage.moves]
    moved = []
    put_out = dense_outputs(dense, lambda j: moved.append(run_dense(j)), moving)
    for j in batches:
        put_out(j)
        assert torch.equal(moved[j], run_dense(j))


def test_the_first_of_branches_that_share_an_input_left_out():
    """As in GPT-J: the other branch reads the input after a layer of the first branch has been used."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.two(self.one(x)) + self.three(x)

    block, x = Block().requires_grad_(False), torch.randn(20, 8)
    selected = without("one.weight")
    order = stages(block, lambda: block(x), selected)
    assert [stage.last for stage in order] == ["two.weight", "three.weight"]
    for stage in order:
        captured = capture(block, lambda j: block(x), [0], backend=TORCH, stage=stage, selected=selected)
        assert [layer.name for layer in captured.layers] == [stage.last]


def test_experts_in_a_list_of_modules_of_which_some_have_lost_their_first_layer():
    """All experts stay in one stage, and no layer is seen twice."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x):
            return self.w2(self.w1(x).relu() * self.w3(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            return sum(expert(x[n::3]).sum(0) for n, expert in enumerate(self.experts))

    block, x = Block().requires_grad_(False), torch.randn(21, 8)
    selected = without("experts.1.w1.weight", "experts.2.w3.weight")
    seen = []
    for stage in stages(block, lambda: block(x), selected):
        captured = capture(block, lambda j: block(x), [0], backend=TORCH, stage=stage, selected=selected)
        seen.append({layer.name for layer in captured.layers})
        for layer in captured.layers:
            if "w2" not in layer.name:
                n = int(layer.name.split(".")[1])
                torch.testing.assert_close(captured.grams[layer.gram], x[n::3].T @ x[n::3])
    assert seen == [
        {"experts.0.w1.weight", "experts.0.w3.weight", "experts.1.w3.weight", "experts.2.w1.weight"},
        {f"experts.{n}.w2.weight" for n in range(3)},
    ]
