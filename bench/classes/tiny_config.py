"""Make tiny configs of any class of transformers from the class's own defaults.

The default config has the entries. An entry's name tells what it counts, and so its tiny value. Equal sizes stay equal
because every width has the same tiny value. A class makes some values of others, such as the types of its layers: it
makes them again. `hints.json` has the entries that neither names nor defaults tell, by the config's class.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

HINTS = json.loads(Path(__file__).with_name("hints.json").read_text("utf-8"))
HIDDEN, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 4
# The bytes and two special tokens. Special ids of a config follow them, and no text has these tokens.
TOKENS = 256 + 2
VOCABULARY = TOKENS + 62
# Tokens that local attention reads, or that a chunk has.
WINDOW = 8
# Numbers above this are taken for sizes, whatever their names.
UNKNOWN = 256

# Entries by their name, and the largest value that they keep. The first pattern that is found counts.
CAPS = {
    r"vocab": VOCABULARY,
    # Scores of fewer heads are often zero, and which of equal ones are the largest is left open.
    r"index(er)?_n_heads": 32,
    r"index_top|index_block|rotary_dim": 8,
    r"tokens_per_(image|side)": 4,
    r"dense_(replace|layers)|num_dense|hash_layers|layer_start|start_layer": 1,
    r"experts_per_tok|experts_per_token|top_?k(_experts)?$|moe_k$|selected_experts|num_activated": 2,
    r"topk_group": 1,
    r"n_groups?$|num_groups?$|ngroups$|shared_experts?$": 2,
    r"experts?$|expert_num$|num_.*experts": 4,
    r"head_dim|dim_head|d_head|head_size|d_kv$|head_width|kv_channels": HEAD_DIM,
    r"key_heads|kv_heads|kv_n_heads|key_value_heads|head_kv|num_kv": 2,
    r"heads?$|^heads_|_heads_": HEADS,
    r"offset$|layer_(index|idx|id)$|feature_layer$|_layer_idx|select_layer": LAYERS - 1,
    r"interval|period|every|_step$|_freq$|pattern$|cadence": LAYERS,
    r"^n_(in|out)put_layers$": 1,
    r"layers?$|^depths?$|_depth$|^num_blocks$|n_blocks|nlayers|layers_per|_layers_": LAYERS,
    r"rank": HEAD_DIM,
    r"state_size|d_state|state_dim|ssm_state": 8,
    # Longer than a window, as by default: some classes go through the blocks several times from there on.
    r"max_.*chunk": 128,
    r"window|chunk|block_size|block_len|stride_len|context_size": WINDOW,
    r"adapter_(in|out|input)_": HIDDEN,
    r"image_size|img_size|crop_size|input_size$|resolution": 32,
    r"patch_size": 8,
    r"expert.*(intermediate|ffn|hidden)|moe.*(intermediate|ffn|hidden)": 48,
    r"intermediate|ffn|inner|ff_dim|mlp_dim|feed_?forward|d_ff|mlp_hidden|ff_size": 96,
    r"position|n_ctx|max_seq|max_.*len|seq_len|context_len|seqlen": 128,
    r"hidden|d_model|embd|embed|width|emb_|^dim$|_dim$|_size$|channels|features": HIDDEN,
}
# Numbers of these names are no sizes, however large they are.
NO_SIZES = re.compile(r"theta|base|freq|rate|seed|token|scal|fft|mel|hop|sampling|factor|version|time|step|eps|floor")
TOKEN_ID = re.compile(r"(^|_)token(_id|_index|_idx)?s?$|(^|_)(id|ids|index)$")
LAYER_LIST = re.compile(r"index(es)?$|indices$|layers?$|layer_ids?$|blocks?$|idxs?$|_ids$")

# Entries that some classes need and leave empty.
NEEDED = dict(
    head_dim=HEAD_DIM, num_key_value_heads=HEADS, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2
)


def tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """Make a tiny config of a class.

    Raises:
        Exception: of any type, where the class's code does not take its own defaults or the tiny values.
    """
    # Each special token gets an id of its own, after those of text.
    return config_class(**tiny_entries(config_class(), count(TOKENS)))


def parts_of(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and all configs inside of it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts_of(value)


def tiny_entries(config: PretrainedConfig, new_ids: Iterator[int]) -> dict[str, Any]:
    """Find the entries of a tiny config of the class of `config`, which has default values."""
    kind = type(config)
    names, fresh, values = {f.name for f in fields(kind)}, vars(kind()), vars(config)
    tiny = {}
    for key, value in values.items():
        if key not in names:
            continue
        if isinstance(value, PretrainedConfig):
            named = {"model_type": value.model_type} if value.model_type else {}
            tiny[key] = named | tiny_entries(value, new_ids)
            continue
        if value is None and key in NEEDED:
            tiny[key] = NEEDED[key]
        changed = fresh[key] != value
        # The class makes the value of other entries where its own default is another one.
        default = value if changed else getattr(kind, key, value)
        small = tiny_value(key, default, values, new_ids)
        if small != default or changed:
            tiny[key] = small
    rope = getattr(config, "rope_parameters", None) or {}
    sectioned = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
    if rope and sectioned and rope.get("partial_rotary_factor", 1.0) >= 0.5:
        # Sections of half of a head: time, height, width.
        tiny["rope_parameters"] = rope | {"mrope_section": [3, 3, 2]}
    return merged(tiny, HINTS.get(kind.__name__, {}).get("entries", {}))


def tiny_value(key: str, value: Any, values: dict[str, Any], new_ids: Iterator[int]) -> Any:
    """Find the tiny value of an entry.

    Args:
        key: name of the entry.
        value: its default.
        values: all entries of the config.
        new_ids: ids for special tokens.
    """
    if type(value) is int:
        return tiny_number(key, value, values, new_ids)
    if not isinstance(value, list | tuple) or not value:
        return value
    if all(type(item) is int for item in value):
        if TOKEN_ID.search(key) and "token" in key:
            return [token_id(key, new_ids)]
        if LAYER_LIST.search(key):
            fitting = sorted({item for item in value if item < LAYERS})
            return type(value)(fitting or [LAYERS - 1])
        value = type(value)(tiny_number(key, item, values, new_ids) for item in value)
    one_per_layer = len(value) == values.get("num_hidden_layers")
    return value[:LAYERS] if one_per_layer else value


def tiny_number(key: str, value: int, values: dict[str, Any], new_ids: Iterator[int]) -> int:
    """Find the tiny value of a number by its name."""
    if TOKEN_ID.search(key) and ("token" in key or value >= VOCABULARY):
        return token_id(key, new_ids)
    unknown = HIDDEN if value > UNKNOWN and not NO_SIZES.search(key) else value
    cap = next((cap for pattern, cap in CAPS.items() if re.search(pattern, key)), unknown)
    as_many_as_queries = cap == 2 and re.search("kv|key", key) and value == values.get("num_attention_heads")
    return min(value, HEADS if as_many_as_queries else cap)


def token_id(key: str, new_ids: Iterator[int]) -> int:
    """Choose the id of a special token: that of the tokenizer, or a new one."""
    if re.search("bos|decoder_start", key):
        return 0
    if re.search("eos|pad", key) and not re.search("image|video|audio|vision|patch", key):
        return 1
    return next(new_ids)


def merged(entries: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Replace entries of a config by others of the same name, and entries of its parts one by one."""
    result = dict(entries)
    for key, value in others.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
