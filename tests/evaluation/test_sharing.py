"""A model shares what its blocks allow, found by running them."""

import pytest
import torch
from helpers.families import FAMILIES, HANDING_ON, OTHERS, TOKENS, save_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.qwen3_next import modeling_qwen3_next

from sparsefw.checkpoint import inspect
from sparsefw.data import token_batch
from sparsefw.evaluation import Request
from sparsefw.evaluation.alike import different_blocks
from sparsefw.evaluation.packing import Sharing, rows_of
from sparsefw.evaluation.sharing import longest_branch, sharing_of
from sparsefw.evaluation.streaming import embedded
from sparsefw.model import StreamedModel, embed_batches

REQUESTS = [Request([*range(3, 27), *range(40 + n, 60 + n)], [5]) for n in range(4)]
# Position biases and states of recurrent layers take no tree.
CHAINS = {"bloom", "mamba", "qwen3_next", "rwkv", "openai-gpt"}
# They look at whole rows.
ROWS = {"xlnet"}
# Local attention that reads less than the requests have.
LOCAL = {"qwen2", "mistral", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "inkling2_text"}
# With few heads, scores of the index are often zero, and torch may take any of those that are equal.
CHANGES = {"glm_moe_dsa": {"index_n_heads": 32}}


def sharing_in(folder, requests=REQUESTS):
    with StreamedModel(inspect(folder), torch.device("cpu")) as model, torch.no_grad(), embedded(model, requests):
        return sharing_of(model, requests), longest_branch(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, *HANDING_ON])
def test_what_each_family_allows(family, dtype, tmp_path):
    save_model(tmp_path, family, dtype, **CHANGES.get(family, {}))
    sharing, longest = sharing_in(tmp_path)
    if family in ROWS:
        assert sharing == Sharing.NOTHING
    elif family in CHAINS:
        assert sharing == Sharing.BEGINNINGS
    else:
        assert sharing == Sharing.BRANCHES
        assert longest == (8 if family in LOCAL else float("inf"))


def test_local_attention_that_its_config_does_not_tell_is_found(tmp_path):
    """The mask of a tree takes the place of the model's own, which knows of the window."""
    neo = {
        "model_type": "gpt_neo",
        "attention_types": [[["global", "local", "global"], 1]],
        "num_layers": 3,
        "num_heads": 4,
        # The tree has more than 64 tokens.
        "max_position_embeddings": 128,
    }
    save_model(tmp_path, "qwen3", window_size=16, **neo)
    with StreamedModel(inspect(tmp_path), torch.device("cpu")) as model, torch.no_grad(), embedded(model, REQUESTS):
        assert longest_branch(model) == 16
        vars(model.runs.config)["window_size"] = None
        assert longest_branch(model) == float("inf")
        assert sharing_of(model, REQUESTS) == Sharing.BEGINNINGS


def save_local(folder, dtype, scale=1.0):
    """A checkpoint whose local attention its config does not tell of; its embeddings are scaled."""
    kinds = [[["local"], 3]]
    neo = {"model_type": "gpt_neo", "attention_types": kinds, "num_layers": 3, "num_heads": 4, "window_size": 16}
    # The tree has more than 64 tokens.
    save_model(folder, "qwen3", dtype, **neo, max_position_embeddings=128)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: x * scale if k.endswith("wte.weight") else x for k, x in tensors.items()}, path, {"format": "pt"})


def test_what_rounding_would_hide_is_found(tmp_path):
    """A block adds little to large hidden states, and half precision rounds off changes of what it adds."""
    save_local(tmp_path, torch.bfloat16, scale=1000.0)
    with StreamedModel(inspect(tmp_path), torch.device("cpu")) as model, torch.no_grad(), embedded(model, REQUESTS):
        vars(model.runs.config)["window_size"] = None
        assert sharing_of(model, REQUESTS) == Sharing.BEGINNINGS


def test_blocks_that_do_not_run_in_fp32(tmp_path, monkeypatch):
    """As some kernels do not."""
    save_model(tmp_path, "qwen3_next", torch.bfloat16)
    forward = modeling_qwen3_next.Qwen3NextRMSNorm.forward

    def halves(self, x):
        assert x.dtype == torch.bfloat16
        return forward(self, x)

    monkeypatch.setattr(modeling_qwen3_next.Qwen3NextRMSNorm, "forward", halves)
    assert sharing_in(tmp_path)[0] == Sharing.BEGINNINGS


class TestDifferentBlocks:
    def blocks(self, folder, family, change=lambda blocks: None, **changes):
        save_model(folder, family, **{"num_hidden_layers": 4, **changes})
        with StreamedModel(inspect(folder), torch.device("cpu")) as model, torch.no_grad():
            change(model.blocks)
            states = embed_batches(model, [token_batch(TOKENS[:1])])
            return different_blocks(model, states)

    def test_equal_ones(self, tmp_path):
        assert self.blocks(tmp_path, "llama") == [0]

    def test_types_in_a_list(self, tmp_path):
        kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
        assert self.blocks(tmp_path, "gemma3_text", layer_types=kinds) == [0, 2]

    def test_shapes(self, tmp_path):
        assert self.blocks(tmp_path, "qwen3_moe", mlp_only_layers=[3]) == [0, 3]

    def test_a_setting_of_a_layer(self, tmp_path):
        def change(blocks):
            blocks[1].self_attn.is_causal = False

        assert self.blocks(tmp_path, "llama", change) == [0, 1]


def test_a_trial_takes_no_more_than_the_pass(tmp_path):
    """A row may have hundreds of short branches behind a long beginning, and each is a row by itself in the trial."""
    save_model(tmp_path, "qwen3")
    requests = [Request([*range(3, 43), 50 + n, 51 + n], [5]) for n in range(60)]
    (row,) = rows_of(requests, Sharing.BRANCHES)
    tokens = []
    hook = register_module_forward_pre_hook(
        lambda module, args: (
            tokens.append(args[0].numel() // args[0].shape[-1]) if isinstance(module, nn.Linear) else None
        )
    )
    try:
        assert sharing_in(tmp_path, requests)[0] == Sharing.BRANCHES
    finally:
        hook.remove()
    assert max(tokens) == len(row.tokens)
