"""Tensors that several blocks share stay as they are: read with each block, and written once."""

import pytest
import torch
from helpers.checkpoints import refused
from helpers.commands import report_of, tensors_of
from helpers.families import TOKENS, save_model
from helpers.verifying import passed
from helpers.whole import check_streamed
from torch import nn
from transformers import AutoModelForCausalLM

from sparsefw import prune
from sparsefw.checkpoint.source import inspect
from sparsefw.estimate.profile import shape_of
from sparsefw.model.swap import DenseBlock, shared_parameters
from sparsefw.selection import without_index

# A model whose attention is one module at several depths.
ZAMBA = {
    "model_type": "zamba2",
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid"] * 3,
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "use_mamba_kernels": False,
    "num_mem_blocks": 1,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "adapter_rank": 8,
    "chunk_size": 8,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("zamba") / "model", "qwen3", **ZAMBA)


def test_blocks_run_as_in_the_whole_model(source):
    model = check_streamed(source)
    assert model.shared.sources
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_what_is_shared_stays_dense_and_the_rest_is_pruned(source, out, capsys):
    result = prune(source, out, dataset=TOKENS, kernel="torch", method="wanda")
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    names = [layer.name for layer in result.layers]
    assert len(set(names)) == len(names)
    assert not any("shared_transf" in name for name in names)
    # Every mamba layer, in blocks with and without attention.
    for i in range(6):
        assert sum(f".layers.{i}." in name and "in_proj" in name for name in names) == 1
    for name, tensor in before.items():
        changed = not torch.equal(tensor, after[name])
        assert changed == (name in map(without_index, names)), name
        assert not changed or (after[name] == 0).float().mean() >= 0.5
    dense = report_of(out)["kept_dense"]
    assert sum("shared_transf" in name and "self_attn.q_proj" in name for name in dense) == 3
    passed(capsys, out)


def test_plan_and_run_agree(source):
    shape = shape_of(inspect(source))
    assert not any("shared_transf" in name for name in shape.layer_names)
    whole = AutoModelForCausalLM.from_pretrained(source)
    # Each tensor once, though a shared one is in memory with each of its blocks.
    assert shape.parameters == sum(p.numel() for p in whole.parameters())
    inside = {n: p for n, p in whole.named_parameters(remove_duplicate=False) if n.startswith("model.layers.")}
    assert sum(block.nbytes for block in shape.blocks) == sum(p.nbytes for p in inside.values())
    assert shape.outside == sum(p.nbytes for n, p in whole.named_parameters() if n not in inside)


class _Tied(nn.Module):
    """Two blocks, each with two layers, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(2))
        self.head = nn.Linear(2, 2)


A, B, C, D = (f"blocks.{n}.{name}.weight" for n in (0, 1) for name in "ab")
HEAD = "head.weight"
# By case: names that are tied though the tensors are different ones until they are loaded, names in the checkpoint,
# shared names, and where the others are read from.
TIED = {
    "blocks, and outside": ({C: A, D: HEAD, "x.weight": "y.weight"}, [A, HEAD], {A, C, D, HEAD}, {C: A, D: HEAD}),
    "a chain": ({C: D, D: B}, [B], {B, C, D}, {C: B, D: B}),
    # A tensor that the checkpoint has twice is read twice, and is shared all the same.
    "twice in the checkpoint": ({C: A}, [A, C], {A, C}, {}),
}


@pytest.mark.parametrize("case", TIED)
def test_names_that_are_tied_are_found(case):
    tied, stored, names, sources = TIED[case]
    shared = shared_parameters(_Tied(), ["blocks.0", "blocks.1"], tied, stored)
    assert (shared.names, shared.sources) == (names, sources)


def test_a_tensor_of_a_block_outside_of_the_blocks_is_refused():
    with refused(r"head\.weight: unsupported .* one tensor with blocks\.0\.a\.weight"):
        shared_parameters(_Tied(), ["blocks.0", "blocks.1"], {HEAD: A}, [A])


def test_a_dense_block_multiplies_with_the_parameters_that_it_names():
    """By these its products are found."""
    block, used = nn.Linear(4, 4), []
    block.register_forward_pre_hook(lambda module, args: used.append(module.weight))
    dense = DenseBlock(block)
    dense(torch.ones(1, 4))
    assert used[0] is dict(dense.named_parameters())["weight"] is not block.weight
