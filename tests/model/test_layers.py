"""Prunable matrices are found where they are used, with the Gram matrices of their inputs."""

import pytest
import torch
from helpers.families import FAMILIES, TOKENS, is_layer, save_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsefw import checkpoint
from sparsefw.kernels.backend import TORCH
from sparsefw.model import StreamedModel, embed
from sparsefw.model.layers import capture, layer_of, not_pruned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Matrices of one block that share an input, by family; all others have an input of their own.
SHARED = {
    "llama": {"self_attn.q_proj": 3, "mlp.gate_proj": 2},
    "gpt_neox": {"attention.query_key_value": 1, "mlp.dense_h_to_4h": 1},
    "opt": {"self_attn.q_proj": 3, "fc1": 1},
    "phi3": {"self_attn.qkv_proj": 1, "mlp.gate_up_proj": 1},
}


def sizes(layers):
    """Number of weights by the name of a layer."""
    return {layer.name: layer.weight.numel() for layer in layers}


def first_block(folder, ids=TOKENS):
    """The first block, a function that runs a micro-batch through it, and the micro-batches' numbers."""
    model = StreamedModel(checkpoint.inspect(folder), DEVICE)
    states = embed(model, ids, 2)
    return model.open(0), lambda j: states.output(0, j), range(len(states))


def capture_first_block(folder, ids=TOKENS):
    block, run, batches = first_block(folder, ids)
    captured = capture(block, run, batches, backend=TORCH, selected=is_layer)
    assert captured.crosses == {}
    assert not any(map(is_layer, captured.ignored))
    return block, captured.layers, captured.grams, not_pruned(block, sizes(captured.layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_is_that_of_the_inputs(family, tmp_path):
    """Gram matrices are those of forward hooks on the linear modules, for every family that has them."""
    block, run, batches = first_block(save_model(tmp_path, family))
    captured = capture(block, run, batches, backend=TORCH, selected=is_layer)
    truth = {}

    def hook(name, args):
        x = args[0].reshape(-1, args[0].shape[-1]).double()
        truth[name] = truth.get(name, 0) + x.T @ x

    for name, module in block.named_modules():
        # The gate of a shared expert is a linear module, and stays dense.
        if isinstance(module, nn.Linear) and not name.endswith("expert_gate"):
            module.register_forward_pre_hook(lambda _m, args, name=name: hook(f"{name}.weight", args))
    for j in batches:
        run(j)
    layers = {layer.name: layer for layer in captured.layers}
    assert truth
    for name, G in truth.items():
        gram = captured.grams[layers[name].gram]
        torch.testing.assert_close(gram.double(), G, rtol=1e-4, atol=1e-4 * G.max().item())
    matrices = {name for name, p in block.named_parameters() if p.dim() == 2}
    assert matrices - {"mlp.gate.weight", "mlp.shared_expert_gate.weight"} <= set(layers)


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_read_the_same_input_share_one_gram(family, tmp_path):
    _, layers, grams, dense = capture_first_block(save_model(tmp_path, family))
    for first, count in SHARED[family].items():
        assert sum(layer.gram == f"{first}.weight" for layer in layers) == count
    assert set(grams) == {layer.gram for layer in layers}
    assert dense == []


def test_experts_without_tokens_are_named(tmp_path):
    folder = save_model(tmp_path, "mixtral")
    # One token reaches two of the four experts.
    _, layers, _, dense = capture_first_block(folder, torch.tensor([[5]]))
    used = {layer.name for layer in layers}
    idle = [e for e in range(4) if f"mlp.experts.gate_up_proj[{e}]" not in used]
    assert idle
    assert {f"mlp.experts.gate_up_proj[{e}]" for e in idle} <= set(dense)


def test_transposed_weights_are_seen_as_out_by_in():
    """Conv1D of GPT-2 stores (in, out) and calls addmm."""
    block = Conv1D(12, 8).requires_grad_(False)
    x = torch.randn(5, 8)
    captured = capture(block, lambda j: block(x), [0], backend=TORCH)
    (layer,) = captured.layers
    assert layer.weight.shape == (12, 8)
    assert layer.transposed
    torch.testing.assert_close(captured.grams["weight"], x.T @ x)
    layer.weight[3].zero_()
    assert not block.weight[:, 3].any()


@pytest.mark.parametrize("out", [1, 8, 12])
@pytest.mark.parametrize("turned", [False, True])
def test_the_order_in_memory_is_not_the_order_of_the_axes(out, turned):
    """A parameter may be a transposed tensor, as of a Conv1D that was made a Linear. A Linear still has (out, in)."""
    blocks = nn.Linear(8, out, bias=False), Conv1D(out, 8)
    if turned:
        for block in blocks:
            block.weight = nn.Parameter(block.weight.detach().T.clone().T)
    x = torch.randn(5, 8)
    found = [capture(block, lambda j, block=block: block(x), [0], backend=TORCH).layers[0] for block in blocks]
    assert [layer.weight.shape for layer in found] == [(out, 8), (out, 8)]
    assert [layer.transposed for layer in found] == [False, True]
    for layer, block in zip(found, blocks, strict=True):
        again = layer_of(block, "weight", "weight", (out, 8), layer.transposed)
        assert again.weight.shape == layer.weight.shape
        assert again.weight.data_ptr() == block.weight.data_ptr()


class _Parts(nn.Module):
    """Multiplies with some rows of a matrix at a time."""

    def __init__(self, *rows):
        super().__init__()
        self.inner, self.rows = nn.Linear(8, 6, bias=False).requires_grad_(False), rows

    def forward(self, x):
        return torch.cat([nn.functional.linear(x[n], self.inner.weight[rows]) for n, rows in enumerate(self.rows)], -1)


@pytest.mark.parametrize("rows", [slice(4), slice(1, 3), slice(0, 6, 2), [0, 1, 2]])
def test_a_part_of_a_matrix_is_not_a_layer(rows):
    """Only parts of one size, one below the other, can be told by an index."""
    block, x = _Parts(rows), torch.randn(1, 5, 8)
    captured = capture(block, lambda j: block(x), [0], backend=TORCH)
    assert captured.layers == captured.ignored == []
    assert captured.grams == {}
    assert not_pruned(block, {}) == ["inner.weight"]


def test_parts_of_one_size_are_layers():
    """As in DBRX, where the experts lie one below the other in one matrix."""
    block, x = _Parts(slice(4, 6), slice(2)), torch.randn(2, 5, 8)
    captured = capture(block, lambda j: block(x), [0], backend=TORCH)
    assert [layer.name for layer in captured.layers] == ["inner.weight[2]", "inner.weight[0]"]
    for n, layer in enumerate(captured.layers):
        assert torch.equal(layer.weight, block.inner.weight[block.rows[n]])
        torch.testing.assert_close(captured.grams[layer.gram], x[n].T @ x[n])
    assert not_pruned(block, sizes(captured.layers)) == ["inner.weight[1]"]
    captured.layers[0].weight.zero_()
    assert not block.inner.weight[4:].any()
    assert block.inner.weight[:4].all()


# Mixtures that multiply otherwise than with one slice of a stacked parameter at a time, or not in the MLP only.
UNUSUAL = {
    # All experts at once, each with all tokens; those of other experts are zero.
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 40,
        "attention_chunk_size": 8,
    },
    # The experts lie one below the other in one matrix.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
    },
    # Attention has experts, too.
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
}


@pytest.fixture(params=UNUSUAL)
def unusual(request, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, request.param, UNUSUAL[request.param])
    return save_model(tmp_path / "model", request.param)


def test_only_routers_of_a_mixture_stay_dense(unusual):
    block, layers, _, dense = capture_first_block(unusual)
    assert dense
    assert all("router" in name for name in dense)
    pruned = sum(layer.weight.numel() for layer in layers)
    matrices = sum(p.numel() for name, p in block.named_parameters() if p.dim() >= 2 and name not in dense)
    assert pruned == matrices
    # Writing to the layers changes all of them.
    for layer in layers:
        layer.weight.zero_()
    assert not any(p.any() for name, p in block.named_parameters() if p.dim() >= 2 and name not in dense)


def test_grams_of_llama4s_experts_are_those_of_the_tokens_that_reach_them(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama4_text", UNUSUAL["llama4_text"])
    block, run, batches = first_block(save_model(tmp_path, "llama4_text"))
    captured = capture(block, run, batches, backend=TORCH, selected=is_layer)
    inputs, scores = [], []
    moe = block.feed_forward
    moe.experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0].view(4, -1, 32).double()))
    moe.router.register_forward_hook(lambda module, args, out: scores.append(out[0]))
    for j in batches:
        run(j)
    X, reached = torch.cat(inputs, 1), torch.cat(scores)
    W = {name: p.double() for name, p in moe.experts.named_parameters()}
    gate, up = (X @ W["gate_up_proj"]).chunk(2, -1)
    hidden = up * nn.functional.silu(gate)
    assert (reached > 0).sum(1).eq(1).all()
    for e in range(4):
        tokens = reached[:, e] > 0
        assert 0 < tokens.sum() < len(reached)
        for name, rows in (("gate_up_proj", X[e, tokens]), ("down_proj", hidden[e, tokens])):
            G = captured.grams[f"feed_forward.experts.{name}[{e}]"].double()
            torch.testing.assert_close(G, rows.T @ rows, rtol=1e-4, atol=1e-5 * G.max().item())
