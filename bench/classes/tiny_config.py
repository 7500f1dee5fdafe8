"""Tiny configs of any class of transformers, made from the class's own defaults.

The default config tells which entries there are. An entry's name tells what it counts, and so its tiny value. Equal
sizes stay equal because every width has the same tiny value. Values that a class makes of others, such as the types of
its layers, are left for it to make again. `hints.py` has what names cannot tell.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from classes.hints import HINTS

HIDDEN, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 4
# The bytes and two special tokens; special ids of a config go behind them, where no text has a token.
TOKENS = 256 + 2
VOCABULARY = TOKENS + 62
# Tokens that local attention reads, and that are computed at once.
WINDOW = 8
# Numbers above this are taken for sizes, whatever they are called.
UNKNOWN = 256

# Entries by their name, and the largest value that they keep. The first pattern that is found counts.
CAPS = [
    (r"vocab", VOCABULARY),
    # Scores of fewer heads are often zero, and which of equal ones are the largest is left open.
    (r"index(er)?_n_heads", 32),
    (r"index_top|index_block|rotary_dim", 8),
    (r"tokens_per_(image|side)", 4),
    (r"kv_shared|shared_kv", 2),
    (r"dense_(replace|layers)|num_dense|hash_layers|layer_start|start_layer", 1),
    (r"experts_per_tok|experts_per_token|top_?k(_experts)?$|moe_k$|selected_experts|num_activated", 2),
    (r"topk_group", 1),
    (r"n_groups?$|num_groups?$|ngroups$|shared_experts?$", 2),
    (r"experts?$|expert_num$|num_.*experts", 4),
    (r"head_dim|dim_head|d_head|head_size|d_kv$|head_width|kv_channels", HEAD_DIM),
    (r"key_heads|kv_heads|kv_n_heads|key_value_heads|head_kv|num_kv", 2),
    (r"heads?$|^heads_|_heads_", HEADS),
    (r"offset$|layer_(index|idx|id)$|feature_layer$|_layer_idx|select_layer", LAYERS - 1),
    (r"interval|period|every|_step$|_freq$|pattern$|cadence", LAYERS),
    (r"^n_(in|out)put_layers$", 1),
    (r"layers?$|^depths?$|_depth$|^num_blocks$|n_blocks|nlayers|layers_per|_layers_", LAYERS),
    (r"rank", HEAD_DIM),
    (r"state_size|d_state|state_dim|ssm_state", 8),
    (r"top_?k", 8),
    # Longer than a window, as the default is: from there on some classes go through the blocks several times.
    (r"max_.*chunk", 128),
    (r"window|chunk|block_size|block_len|stride_len|context_size", WINDOW),
    (r"adapter_(in|out|input)_", HIDDEN),
    (r"image_size|img_size|crop_size|input_size$|resolution", 32),
    (r"patch_size", 8),
    (r"expert.*(intermediate|ffn|hidden)|moe.*(intermediate|ffn|hidden)", 48),
    (r"intermediate|ffn|inner|ff_dim|mlp_dim|feed_?forward|d_ff|mlp_hidden|ff_size", 96),
    (r"position|n_ctx|max_seq|max_.*len|seq_len|context_len|seqlen", 128),
    (r"hidden|d_model|embd|embed|width|emb_|^dim$|_dim$|_size$|channels|features", HIDDEN),
]  # fmt: skip
# Numbers of these names are no sizes, however large they are.
NO_SIZES = re.compile(r"theta|base|freq|rate|seed|token|scal|fft|mel|hop|sampling|factor|version|time|step|eps|floor")
TOKEN_ID = re.compile(r"(^|_)token(_id|_index|_idx)?s?$|(^|_)(id|ids|index)$")
LAYER_LIST = re.compile(r"index(es)?$|indices$|layers?$|layer_ids?$|blocks?$|idxs?$|_ids$")

# Entries that some classes need and leave empty.
NEEDED = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}
NEEDED |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}


def tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """A tiny config of a class.

    Raises:
        Exception: of any type, where the class's code does not take its own defaults or the tiny values.
    """
    entries = _Shrinker().entries(config_class())
    config = config_class(**entries)
    if _complete(config_class(), config, entries):
        config = config_class(**entries)
    return config


def parts_of(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and all configs inside of it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts_of(value)


class _Shrinker:
    """Makes the entries of tiny configs; ids of special tokens are given out once each."""

    def __init__(self) -> None:
        self._next_id = TOKENS

    def entries(self, config: PretrainedConfig) -> dict[str, Any]:
        """The entries that make a tiny config of the class of `config`, a config with default values."""
        kind = type(config)
        names, fresh, values = {f.name for f in fields(kind)}, vars(kind()), vars(config)
        tiny: dict[str, Any] = {}
        for key, value in values.items():
            if key not in names or key in _COMMON:
                continue
            if isinstance(value, PretrainedConfig):
                named = {"model_type": value.model_type} if value.model_type else {}
                tiny[key] = named | self.entries(value)
                continue
            if value is None and key in NEEDED:
                tiny[key] = NEEDED[key]
            given = fresh[key] != value
            # The class makes the value of other entries where its own default is another one.
            default = value if given else getattr(kind, key, value)
            small = self._value(key, default, values)
            if small != default or given:
                tiny[key] = small
        _keep_product(values, tiny)
        _fit_rotary_sections(config, tiny)
        return merged(tiny, HINTS.get(kind.__name__, {}))

    def _value(self, key: str, value: Any, values: dict[str, Any]) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._number(key, value, values)
        if not isinstance(value, list | tuple) or not value:
            return value
        depth = _depth(values)
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            if TOKEN_ID.search(key) and "token" in key:
                return [self._number(key, item, values) for item in value][:1]
            if LAYER_LIST.search(key) and len(value) != depth:
                fitting = sorted({item for item in value if item < LAYERS})
                return type(value)(fitting or [LAYERS - 1])
            value = type(value)(self._number(key, item, values) for item in value)
        # One entry for each layer.
        return value[:LAYERS] if depth and len(value) == depth > LAYERS else value

    def _number(self, key: str, value: int, values: dict[str, Any]) -> int:
        if TOKEN_ID.search(key) and ("token" in key or value >= VOCABULARY):
            return self._token(key, value)
        if value <= 0:
            return value
        unknown = HIDDEN if value > UNKNOWN and not NO_SIZES.search(key) else value
        cap = next((cap for pattern, cap in CAPS if re.search(pattern, key)), unknown)
        if cap == 2 and re.search("kv|key", key) and value in (values.get(name) for name in _QUERY_HEADS):
            # As many as there are heads of queries.
            cap = HEADS
        if cap == HEADS and re.search("head", key) and value == 3:
            # Widths are powers of two.
            return 2
        return min(value, cap)

    def _token(self, key: str, value: int) -> int:
        if value < 0:
            return value
        if re.search("bos|decoder_start", key):
            return 0
        if re.search("eos|pad", key) and not re.search("image|video|audio|vision|patch", key):
            return 1
        self._next_id += 1
        return min(self._next_id - 1, VOCABULARY - 1)


_QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
# Entries of every config, which are no part of the model.
_COMMON = set(vars(PretrainedConfig()))


def _depth(values: dict[str, Any]) -> int:
    """The number of layers, under any of its names; 0: none is there."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")
    return next((values[name] for name in names if isinstance(values.get(name), int)), 0)


def _keep_product(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    """Keep heads * head_dim == expand * hidden_size where the defaults have it, as state spaces need it."""
    hidden = values.get("hidden_size")
    for expand in (values[key] for key in ("expand", "mamba_expand") if isinstance(values.get(key), int)):
        for heads in (key for key in tiny if re.search(r"heads$", key)):
            for width in (key for key in tiny if re.search(r"head_dim$|d_head$", key)):
                if values[heads] * values[width] == expand * hidden:
                    tiny[heads] = expand * HIDDEN // tiny[width]


def _complete(default: PretrainedConfig, tiny: PretrainedConfig, entries: dict[str, Any]) -> bool:
    """Give the entries lists with each type of layer once at least, in the order in which the default has them.

    Returns:
        Whether a list lacked a type. There are as many layers as the list has entries.
    """
    lacked = False
    for key, value in vars(default).items():
        other = vars(tiny).get(key)
        if isinstance(value, PretrainedConfig) and isinstance(other, PretrainedConfig):
            inner = entries.get(key, {})
            if _complete(value, other, inner):
                entries[key], lacked = inner, True
        if not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
            continue
        if isinstance(other, list) and len(other) in (LAYERS, _depth(vars(tiny))) and set(other) != set(value):
            kinds, lacked = list(dict.fromkeys(value)), True
            entries[key] = [kinds[n % len(kinds)] for n in range(max(len(other), len(kinds)))]
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
                if name in entries:
                    entries[name] = max(entries[name], len(entries[key]))
    return lacked


def _fit_rotary_sections(config: PretrainedConfig, tiny: dict[str, Any]) -> None:
    """Make the sections of a rotary embedding (time, height, width) fit the tiny width of a head."""
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    hinted = "rope_parameters" in HINTS.get(type(config).__name__, {})
    if hinted or "mrope_section" not in {*rope, *getattr(config, "ignore_keys_at_rope_validation", ())}:
        return
    width = tiny.get("qk_rope_head_dim") or tiny.get("head_dim") or HEAD_DIM
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    if half >= 3:
        third = (half + 1) // 3
        tiny["rope_parameters"] = rope | {"mrope_section": [third, third, half - 2 * third]}


def merged(entries: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Entries of a config, with others in the place of those of the same name; those of its parts one by one."""
    result = dict(entries)
    for key, value in others.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
