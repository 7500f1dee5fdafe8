"""Prunable matrices are found where they are used, with the Gram matrices of their inputs."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers.families import FAMILIES, TOKENS, save_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsefw import checkpoint
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.model import StreamedModel, embed
from sparsefw.model.layers import capture, not_pruned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Matrices of one block that share an input, by family; all others have an input of their own.
SHARED = {
    "llama": {"self_attn.q_proj": 3, "mlp.gate_proj": 2},
    "gpt_neox": {"attention.query_key_value": 1, "mlp.dense_h_to_4h": 1},
    "opt": {"self_attn.q_proj": 3, "fc1": 1},
    "phi3": {"self_attn.qkv_proj": 1, "mlp.gate_up_proj": 1},
}


def first_block(folder, ids=TOKENS):
    """The first block, a function that runs a micro-batch through it, and the micro-batches' numbers."""
    model = StreamedModel(checkpoint.inspect(folder), DEVICE)
    states = embed(model, ids, 2)
    return model.open(0), lambda j: states.output(0, j), range(len(states))


def capture_first_block(folder, ids=TOKENS):
    block, run, batches = first_block(folder, ids)
    captured = capture(block, run, batches, backend=TORCH)
    assert captured.crosses == {}
    assert captured.ignored == []
    return block, captured.layers, captured.grams, not_pruned(block, [layer.name for layer in captured.layers])


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_is_that_of_the_inputs(family, tmp_path):
    """Gram matrices are those of forward hooks on the linear modules, for every family that has them."""
    block, run, batches = first_block(save_model(tmp_path, family))
    captured = capture(block, run, batches, backend=TORCH)
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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_expert_is_a_layer_and_the_router_stays_dense(family, tmp_path):
    block, layers, _, dense = capture_first_block(save_model(tmp_path, family))
    names = [layer.name for layer in layers]
    for e in range(4):
        assert f"mlp.experts.gate_up_proj[{e}]" in names
        assert f"mlp.experts.down_proj[{e}]" in names
    assert dense == ["mlp.gate.weight"]
    # A layer's weight is a view: writing to it changes the block.
    layer = layers[names.index("mlp.experts.down_proj[2]")]
    layer.weight.zero_()
    assert not block.mlp.experts.down_proj[2].any()
    assert block.mlp.experts.down_proj[1].any()


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
    torch.testing.assert_close(captured.grams["weight"], x.T @ x)
    layer.weight[3].zero_()
    assert not block.weight[:, 3].any()


def test_gram_matrices_are_mirrored_after_the_last_micro_batch():
    """Until then nothing is known of what stands above the diagonal."""

    def gram_accumulate(G, X, *, precision):
        cpu.gram_accumulate(G, X, precision=precision)
        G[tuple(torch.triu_indices(*G.shape, 1))] = torch.nan
        return G

    backend = Backend(SimpleNamespace(**vars(cpu) | {"gram_accumulate": gram_accumulate}))
    block, X = nn.Linear(8, 6).requires_grad_(False), torch.randn(3, 5, 8)
    captured = capture(block, lambda j: block(X[j]), range(3), backend=backend)
    G = captured.grams["weight"]
    torch.testing.assert_close(G, X.flatten(0, 1).T @ X.flatten(0, 1))
    assert torch.equal(G, G.T)


def test_inputs_are_let_go_after_their_micro_batch():
    block = nn.Linear(8, 6).requires_grad_(False)
    alive = []

    def run(j):
        assert not any(ref() is not None for ref in alive)
        x = torch.randn(5, 8)
        alive.append(weakref.ref(x))
        block(x)

    capture(block, run, range(3), backend=TORCH)
    assert not any(ref() is not None for ref in alive)


def test_a_part_of_a_matrix_is_not_a_layer():
    block = nn.Linear(8, 6, bias=False)
    x = torch.randn(5, 8)
    half = _Half(block)
    captured = capture(half, lambda j: half(x), [0], backend=TORCH)
    assert captured.layers == captured.ignored == []
    assert captured.grams == {}
    assert not_pruned(half, []) == ["inner.weight"]


class _Half(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight[:3])
