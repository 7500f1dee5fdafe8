"""Tensors that several blocks share stay as they are: read with each block, and written once."""

import json

import pytest
import torch
from helpers.commands import tensors_of
from helpers.families import TOKENS, first_is_fast, save_model
from helpers.verifying import verdict
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from sparsefw import prune
from sparsefw.checkpoint.source import inspect
from sparsefw.errors import InputError
from sparsefw.estimate.profile import shape_of
from sparsefw.model import StreamedModel, embed
from sparsefw.model.head import logits
from sparsefw.model.skeleton import attention_implementation
from sparsefw.model.swap import DenseBlock, shared_parameters, slots_of
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
    with StreamedModel(inspect(source), torch.device("cpu")) as model:
        assert model.shared.sources
        assert any(note.startswith(f"stay dense: {len(model.shared.names)} parameters") for note in model.notes)
        states = embed(model, TOKENS, 2)
        for i in range(len(model.blocks)):
            model.open(i)
            states.advance(i)
            model.close(i)
        assert all(parameter.is_meta for parameter in model.model.parameters())
        same = {"attn_implementation": attention_implementation(model.model), "experts_implementation": "eager"}
        whole = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **same).eval()
        for hidden, batch in zip(states.hidden, TOKENS.split(2), strict=True):
            with torch.no_grad():
                expected = whole(batch, use_cache=False).logits
            assert torch.equal(logits(model, batch, hidden), expected)


@pytest.mark.parametrize("options", first_is_fast([{"method": "wanda"}, {"steps": 2}]))
def test_what_is_shared_stays_dense_and_the_rest_is_pruned(options, source, tmp_path, capsys):
    result = prune(source, tmp_path / "out", dataset=TOKENS, kernel="torch", **options)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
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
    dense = json.loads((tmp_path / "out" / "report.json").read_text())["kept_dense"]
    assert sum("shared_transf" in name and "self_attn.q_proj" in name for name in dense) == 3
    status, printed, _ = verdict(capsys, tmp_path / "out")
    assert status == 0, printed


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


BLOCKS = ["blocks.0", "blocks.1"]


def test_one_tensor_under_two_names_is_found():
    model = _Tied()
    model.blocks[1]["b"].weight = model.blocks[0]["a"].weight
    model.blocks[0]["b"].weight = model.blocks[0]["a"].weight
    names = {"blocks.0.a.weight", "blocks.0.b.weight", "blocks.1.b.weight"}
    for source in names:
        shared = shared_parameters(model, BLOCKS, {}, [source, "head.weight"])
        assert shared.names == names
        assert shared.sources == dict.fromkeys(names - {source}, source)


def test_a_block_names_its_parameters_itself():
    model = _Tied()
    model.blocks[1]["b"].weight = model.blocks[0]["a"].weight
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    for whole, prefix in ((model, ""), (checkpoint_wrapper(model), "_checkpoint_wrapped_module.")):
        names = [slot.path for slot in slots_of(whole.named_modules(remove_duplicate=False))]
        blocks = [prefix + name for name in BLOCKS]
        shared = {f"{prefix}blocks.0.a.weight", f"{prefix}blocks.1.b.weight"}
        assert shared_parameters(whole, blocks, {}, names).names == shared


def test_names_that_are_tied_are_found():
    """Though the tensors are different ones until they are loaded."""
    tied = {"blocks.1.a.weight": "blocks.0.a.weight", "blocks.1.b.weight": "head.weight", "x.weight": "y.weight"}
    shared = shared_parameters(_Tied(), BLOCKS, tied, ["blocks.0.a.weight", "head.weight"])
    assert shared.names == {*tied, *tied.values()} - {"x.weight", "y.weight"}
    assert shared.sources == {"blocks.1.a.weight": "blocks.0.a.weight", "blocks.1.b.weight": "head.weight"}
    chain = {"blocks.1.a.weight": "blocks.1.b.weight", "blocks.1.b.weight": "blocks.0.b.weight"}
    shared = shared_parameters(_Tied(), BLOCKS, chain, ["blocks.0.b.weight"])
    assert shared.sources == dict.fromkeys(chain, "blocks.0.b.weight")


def test_what_the_checkpoint_has_twice_is_read_by_itself_and_is_shared_all_the_same():
    tied = {"blocks.1.a.weight": "blocks.0.a.weight"}
    shared = shared_parameters(_Tied(), BLOCKS, tied, ["blocks.0.a.weight", "blocks.1.a.weight"])
    assert shared.names == {*tied, *tied.values()}
    assert shared.sources == {}


def test_a_tensor_of_a_block_outside_of_the_blocks_is_refused():
    tied = {"head.weight": "blocks.0.a.weight"}
    with pytest.raises(InputError, match=r"head.weight: unsupported model _Tied: .* one tensor with blocks.0.a.weight"):
        shared_parameters(_Tied(), BLOCKS, tied, ["blocks.0.a.weight"])


@torch.no_grad()
def test_a_dense_block_runs_with_the_weights_that_it_had():
    """Its parameters are those that it multiplies with, so that its products are found."""
    block, x, used = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4), []
    block[1].weight = block[0].weight
    block[0].register_forward_pre_hook(lambda module, args: used.append(module.weight))
    expected, dense = block(x), DenseBlock(block)
    for parameter in block.parameters():
        parameter.zero_()
    assert torch.equal(dense(x), expected)
    assert not block(x).any()
    parameters = dict(dense.named_parameters())
    assert parameters.keys() == dict(block.named_parameters()).keys()
    assert [id(weight) for weight in used] == [
        id(x) for x in (block[0].weight, parameters["0.weight"], block[0].weight)
    ]
