"""Tiny random models of every family that must work, as checkpoints on disk."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from classes.tiny_model import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, __version__
from transformers.utils import logging

# A test that saves a model looks at what a command prints, whichever test of its file comes first.
logging.disable_progress_bar()

VOCABULARY = 256 + 2
# Tokens for six windows.
TOKENS = torch.randint(2, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))

COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
_SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# By model_type: what the tiny config adds to the common part.
FAMILIES = {
    "llama": dict(tie_word_embeddings=True),
    "qwen2": dict(use_sliding_window=True, max_window_layers=1, **_SLIDING),
    "qwen3": {},
    "mistral": dict(sliding_window=8),
    "gemma2": dict(query_pre_attn_scalar=8, **_SLIDING),
    "gemma3_text": dict(query_pre_attn_scalar=8, **_SLIDING),
    "phi3": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True),
    "gpt_neox": {},
    "mixtral": EXPERTS,
    "qwen2_moe": dict(decoder_sparse_step=1, shared_expert_intermediate_size=40, **EXPERTS),
    "qwen3_moe": dict(decoder_sparse_step=1, **EXPERTS),
}

_GPT = dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48)

# Blocks that are made otherwise: parallel branches, transposed weights, biases, scaled sums, norms after layers,
# linear attention, state spaces. `model_type` is given where it is not the name.
OTHERS = {
    "llama with biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "gpt2": _GPT,
    "bloom": dict(n_layer=3, n_head=4),
    "gptj": dict(rotary_dim=4, **_GPT),
    "cohere": {},
    "granitemoe": EXPERTS,
    "falcon": dict(head_dim=None),
    "granite": dict(residual_multiplier=0.5, attention_multiplier=0.3),
    "olmo2": {},
    "mamba": dict(state_size=8, expand=2, time_step_rank=4),
    "qwen3_next": dict(
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        shared_expert_intermediate_size=40, decoder_sparse_step=1,
        layer_types=["linear_attention", "full_attention", "linear_attention"], **EXPERTS,
    ),
    "deepseek_v3": dict(
        moe_intermediate_size=16, first_k_dense_replace=1, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=32,
        head_dim=16, qk_rope_head_dim=16, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1,
    ),
    "gpt_oss": dict(
        intermediate_size=64, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip

_SHARED_KEYS = dict(
    num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=8,
    num_kv_shared_layers=2, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
)  # fmt: skip
_INDEXED = dict(
    num_key_value_heads=4, head_dim=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
    v_head_dim=8, index_n_heads=2, index_head_dim=8,
    # Fewer than there are tokens.
    index_topk=6,
    n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, mlp_layer_types=["dense", "sparse", "sparse"],
    indexer_types=["full", "shared", "shared"], **EXPERTS,
)  # fmt: skip

# Blocks that hand on more than hidden states: keys and values in a dict, indices, lists, sums of earlier tensors.
HANDING_ON = {
    "gemma3n_text": dict(
        altup_num_inputs=4, laurel_rank=8, intermediate_size=[48] * 6, activation_sparsity_pattern=[0.0] * 6,
        **_SHARED_KEYS,
    ),
    "gemma4_text": _SHARED_KEYS,
    "glm_moe_dsa": _INDEXED,
    "rwkv": dict(attention_hidden_size=32, context_length=64),
    # Hidden states of (tokens, windows).
    "xlnet": dict(d_model=32, n_layer=3, n_head=4, d_inner=48, max_position_embeddings=None),
    "openai-gpt": _GPT,
    "inkling2_text": dict(
        num_hidden_layers=5, n_layers_per_attn_res_block=2, unpadded_vocab_size=VOCABULARY,
        layer_types=["hybrid_sliding", "hybrid"] * 2 + ["hybrid"], swa_num_attention_heads=4,
        swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, d_rel=4, rel_extent=64, n_routed_experts=4,
        **EXPERTS,
    ),
}  # fmt: skip


# Checkpoints by what they were made of, each with the state of torch's generator after it.
_MADE: dict[str, tuple[tempfile.TemporaryDirectory, torch.Tensor]] = {}


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
    """A random checkpoint of a family with a byte-level tokenizer; `changes` go into its config, None takes out.

    It is made once, and then copied.
    """
    key = repr((family, dtype, seed, changes))
    if key not in _MADE:
        torch.manual_seed(seed)
        options = COMMON | {"model_type": family} | (FAMILIES | OTHERS | HANDING_ON)[family] | changes
        config = AutoConfig.for_model(**{name: value for name, value in options.items() if value is not None})
        made = tempfile.TemporaryDirectory()
        write_random(AutoModelForCausalLM.from_config(config, dtype=dtype), Path(made.name))
        _MADE[key] = made, torch.get_rng_state()
    made, state = _MADE[key]
    torch.set_rng_state(state)
    return shutil.copytree(made.name, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)


def experts_like(family: str, tokens: int = 7) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """The experts of a block of a family, random, and what they are given: hidden states, numbers, weights."""
    config = AutoConfig.for_model(**(COMMON | EXPERTS | {"model_type": family}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    experts = next((module for module in model.modules() if hasattr(module, "_apply_gate")), None)
    if experts is None:
        pytest.skip(f"transformers {__version__} has experts of another kind in {family}")
    scores, numbers = torch.randn(tokens, experts.num_experts).topk(2)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts, [torch.randn(tokens, config.hidden_size), numbers, scores]


def write_random(model: torch.nn.Module, folder: Path) -> Path:
    """Give a model random matrices, and write it to a folder with a byte-level tokenizer."""
    for parameter in model.parameters():
        # With the usual initialisation, all logits would be nearly equal.
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def first_is_fast(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Values of a parameter, or tuples of values, of which `make test` takes the first ones: the others are slow."""
    values = list(values)
    as_tuples = (value if isinstance(value, tuple) else (value,) for value in values[fast:])
    return [*values[:fast], *(pytest.param(*value, marks=pytest.mark.slow) for value in as_tuples)]


def is_layer(name: str) -> bool:
    """Whether a matrix of these families that a block multiplies with is a layer, and no router."""
    return not name.endswith(("gate.weight", "router.weight", "router.layer.weight"))


def change_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    """Change entries of a checkpoint's config, or of another file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(source: Path, folder: Path) -> Path:
    """A copy of a model's config alone, in another folder."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder
