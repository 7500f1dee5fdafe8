"""In every kind of mixture that transformers has, the routers stay dense, and all other matrices are pruned.

A model of two blocks or more is described from its config: no weights are needed. The table names the routers.
"""

import json
import re

import pytest
import torch
from helpers.families import COMMON, EXPERTS, first_is_fast
from transformers import AutoConfig, AutoModelForCausalLM

from sparsefw.estimate.plan import describe
from sparsefw.selection import without_index

E, D = 4, 32

# Parameters that no product reads: convolutions, decays, biases of experts, tables.
NO_PRODUCT = re.compile(r"conv|A_log|_bias$|_embed\.weight$")

_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": E,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# By model_type: what its config adds, and the routers by their names inside a block.
MIXTURES = {
    "deepseek_v3": (_LATENT, {"mlp.gate.weight": (E, D)}),
    "jetmoe": (
        {"kv_channels": 8},
        {"mlp.router.layer.weight": (E, D), "self_attention.experts.router.layer.weight": (E, D)},
    ),
    "llama4_text": (
        {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 40},
        {"feed_forward.router.weight": (E, D)},
    ),
    "qwen2_moe": (
        {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 40},
        {"mlp.gate.weight": (E, D), "mlp.shared_expert_gate.weight": (1, D)},
    ),
}


def described(config, folder):
    """The shape of a model that has a config alone."""
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "float32"}, default=str))
    return describe(str(folder)).shape


@pytest.mark.parametrize("model_type", first_is_fast(MIXTURES))
def test_only_the_routers_stay_dense(model_type, tmp_path):
    changes, routers = MIXTURES[model_type]
    config = AutoConfig.for_model(**(COMMON | EXPERTS | {"model_type": model_type} | changes))
    shape = described(config, tmp_path)
    pruned = {without_index(name) for name in shape.layer_names}
    blocks = tuple(f"{name}." for name, _ in shape.names_by_block)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dense = {
        name.removeprefix(next(block for block in blocks if name.startswith(block))): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.startswith(blocks) and parameter.dim() >= 2 and name not in pruned
    }
    assert {name: size for name, size in dense.items() if not NO_PRODUCT.search(name)} == routers


@pytest.mark.parametrize("routed", first_is_fast([E, 1]))
def test_experts_beside_those_without_weights(routed, tmp_path):
    """No choice of the tokens, by which the block is found, hides the experts that have weights."""
    layers = [f"mlp.experts.{name}[{e}]" for name in ("gate_up_proj", "down_proj") for e in range(routed)]
    changes = {"zero_expert_num": 60, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "moe_topk": 2}
    changes |= {"n_routed_experts": routed}
    latent = {name: _LATENT[name] for name in _LATENT if name != "first_k_dense_replace"}
    options = COMMON | latent | changes | {"model_type": "longcat_flash", "num_layers": 2, "num_hidden_layers": 4}
    config = AutoConfig.for_model(**options)
    shape = described(config, tmp_path)
    assert [name for name, _ in shape.names_by_block] == ["model.layers.0", "model.layers.1"]
    assert set(shape.layer_names) >= {f"model.layers.0.{layer}" for layer in layers}
    # The two attentions and the two MLPs of a block, which are numbered, are no experts.
    assert all(("experts" in layer.name) == bool(layer.experts) for layer in shape.blocks[0].layers)
