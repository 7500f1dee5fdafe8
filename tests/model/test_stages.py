"""Stages: which layers are pruned together, and how much of the block each of them runs."""

import copy
import functools

import pytest
import torch
from helpers.damaged import damaged_pair
from helpers.families import save_model
from torch import nn

from sparsefw.kernels.backend import TORCH
from sparsefw.model.layers import Stage, capture, dense_outputs, stages


class TestStages:
    @pytest.mark.parametrize(
        ("family", "expected"),
        [
            ("llama", "self_attn.q_proj:self_attn.v_proj self_attn.o_proj mlp.gate_proj:mlp.up_proj mlp.down_proj"),
            # Numbers in these names do not stand for experts.
            ("opt", "self_attn.q_proj:self_attn.v_proj self_attn.out_proj fc1 fc2"),
            # Parallel branches read inputs of their own.
            ("gpt_neox", "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        ],
    )
    def test_in_the_order_of_use(self, family, expected, tmp_path):
        """In all of these families the last layer writes to the stream, and the stream is the block's output."""
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, family))
        names = [pair.partition(":")[::2] for pair in expected.split()]
        assert stages(block, functools.partial(run, 0)) == [
            Stage(f"{key}.weight", f"{last or key}.weight", (key, last) == names[-1], (key, last) == names[-2])
            for key, last in names
        ]

    def test_experts_go_together(self, tmp_path):
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, "mixtral"))
        order = stages(block, functools.partial(run, 0))
        assert order[2:] == [
            Stage("mlp.experts.gate_up_proj*", None),
            Stage("mlp.experts.down_proj*", None, final=True, moves=True),
        ]

    def test_the_dense_model_moves_on_last_where_the_block_puts_out_something_else(self, tmp_path):
        """In gemma2 a norm follows the last layer."""
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, "gemma2"))
        assert [stage.moves for stage in stages(block, functools.partial(run, 0))] == [False, False, False, True]
        layer, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(20, 8)
        assert stages(layer, lambda: layer(x)) == [Stage("weight", "weight", final=True, moves=True)]
        assert stages(nn.Identity(), lambda: x) == []

    def test_the_stage_that_moves_on_sees_no_further_than_others(self):
        """Its layer's output goes into a sum after the next layer, and the pruned block does not run that far."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x):
                first = self.one(x)
                return first + self.two(first.relu())

        block, x = Block().requires_grad_(False), torch.randn(20, 8)
        first, last = stages(block, lambda: block(x))
        assert (first.moves, last.moves) == (True, False)
        moved = []
        put_out = dense_outputs(block, lambda j: moved.append(block(x)), first)
        assert torch.equal(put_out(0)("one.weight"), block.one(x))
        assert torch.equal(moved[0], block(x))

    @pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox"])
    def test_give_what_the_whole_block_gives(self, family, tmp_path):
        block, _, run, _, batches = damaged_pair(save_model(tmp_path, family))
        whole = capture(block, run, batches, backend=TORCH)
        layers, grams = [], {}
        for stage in stages(block, functools.partial(run, 0)):
            captured = capture(block, run, batches, backend=TORCH, stage=stage)
            layers += captured.layers
            grams |= captured.grams
        assert {(layer.name, layer.gram) for layer in layers} == {(layer.name, layer.gram) for layer in whole.layers}
        assert grams.keys() == whole.grams.keys()
        for name, G in whole.grams.items():
            assert torch.equal(grams[name], G)

    def test_branches_that_share_an_input_go_together(self):
        """As in GPT-J, the second branch reads the input again after other layers have been used."""
        block, x = _Parallel().requires_grad_(False), torch.randn(20, 8)
        order = stages(block, lambda: block(x))
        assert order == [Stage("one.weight", "three.weight", moves=True), Stage("two.weight", "two.weight", final=True)]
        captured = capture(block, lambda j: block(x), [0], backend=TORCH, stage=order[0])
        assert [layer.name for layer in captured.layers] == ["one.weight", "three.weight"]
        assert list(captured.grams) == ["one.weight"]

    def test_run_no_more_of_the_block_than_they_need(self, tmp_path):
        block, _, run, _, _ = damaged_pair(save_model(tmp_path, "llama"))
        used = set()
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_, n=name: used.add(n))
        reached = []
        for stage in stages(block, functools.partial(run, 0)):
            used.clear()
            capture(block, run, [0], backend=TORCH, stage=stage)
            reached.append(len(used))
        assert reached == [3, 4, 6, 7]


class _Unseen(nn.Module):
    """A layer that writes to the stream, and behind it a product in which no layer is seen."""

    def __init__(self, first, second):
        super().__init__()
        self.proj, self.experts = nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(2, 8, 8))
        self.first, self.second = first, second

    def forward(self, h):
        h = self.first(h, self.proj(h.tanh()))
        return self.second(h, torch.bmm(h.expand(2, -1, -1), self.experts).sum(0))


@pytest.mark.parametrize("add", [torch.add, torch.Tensor.__add__, lambda x, y: y + x], ids=["add", "left", "right"])
def test_a_sum_that_is_read_is_not_followed_any_further(add):
    """The block's output depends on what the layer puts out: it is not the layer's to repair."""
    torch.manual_seed(0)
    dense, X = _Unseen(add, add), torch.randn(5, 8)
    pruned = copy.deepcopy(dense)
    pruned.proj.weight.data[:, ::2] = 0
    run, run_dense = (lambda j: pruned(X)), (lambda j: dense(X))
    (stage,) = stages(pruned, lambda: run(0))
    assert (stage.final, stage.moves) == (True, True)
    outputs = dense_outputs(dense, run_dense, stage)
    captured = capture(pruned, run, range(1), backend=TORCH, stage=stage, dense=outputs)
    gap = X.tanh() @ (dense.proj.weight - pruned.proj.weight).T
    torch.testing.assert_close(captured.crosses["proj.weight"], gap.T @ X.tanh(), rtol=1e-4, atol=1e-5)


class _Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x)) + self.three(x)
