"""Checkpoints made to do harm, drawn by a grammar from what all families of transformers have.

Their files name baits, ask for more than any model, or do too much with a text.
"""

import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from helpers.checkpoints import TENSORS
from helpers.texts import make_tokenizer
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from sparsefw.checkpoint.tokenizer_trust import FOLLOWED, SAFE
from sparsefw.checkpoint.trust import COUNT

# Files by name.
Files = dict[str, bytes]

# Entries that classes and libraries may take for places.
PLACES = [
    *("vocab_file", "merges_file", "tokenizer_file", "spm_file", "source_spm", "target_spm", "vocab", "merges"),
    *("emoji_file", "normalizer_file", "entity_vocab_file", "src_vocab_file", "tgt_vocab_file", "target_vocab_file"),
    *("word_shape_file", "word_pronunciation_file", "monolingual_vocab_file", "added_tokens_file", "gguf_file"),
    *("special_tokens_map_file", "tokenizer_config_file", "chat_template_file", "name_or_path", "_name_or_path"),
    *("tokenizer_object", "init_inputs", "config", "backend", "cache_dir", "subfolder", "revision", "init_kwargs"),
    *("sp_model_kwargs", "mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs", "fast_tokenizer_files", "auto_map"),
    *("backbone", "backbone_config", "architecture", "model_args", "encoder", "decoder", "text_config"),
    *("quantization_config", "generation_config", "base_model_name_or_path", "adapter", "peft_config", "torch_dtype"),
    *("configuration_files", "transformers_weights", "_commit_hash", "transformers_version", "audio_tokenizer"),
    *("pretrained_cfg", "label_names", "dtype", "attn_implementation", "kernel_config", "use_kernels", "model_name"),
]
COMMON_CLASSES = [f"{name}Tokenizer" for name in ("GPT2", "Qwen2", "Llama", "Roberta", "Bart", "T5", "Gemma", "Bert")]
HUGE = [2**16, 10**5, 2**20, 10**6, 2**24, 10**8, 10**9, 2**31, 2**40, 10**12, 2**63 - 1, 10**30]
PATTERNS = ["(a+)+$", "(.*)*x", "(a|aa)+b", "", ".", "a{1,1000}{1,1000}", "(?=(a+))\\1+b", "\\p{L}+", "((a*)*)*b"]
COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@cache
def kinds() -> list[str]:
    """Types of model whose config has valid defaults."""
    return sorted(CONFIG_MAPPING)


@cache
def generating() -> list[str]:
    """Those of them that generate text."""
    return sorted(
        {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} & set(CONFIG_MAPPING)
    )


@cache
def config_of(kind: str) -> dict[str, Any]:
    try:
        return json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    except (StrictDataclassError, ImportError, ValueError):
        # This config has no valid default.
        return {"model_type": kind}


@cache
def classes() -> list[str]:
    """Names of tokenizers' classes."""
    return sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name} | {"PreTrainedTokenizerFast"})


@cache
def tokenizer_json() -> str:
    return make_tokenizer(bos=True).backend_tokenizer.to_str()


def draw(choose: random.Random, bait: str, kind: str = "", sizes: Mapping[str, int] = MappingProxyType({})) -> Files:
    """The files of a checkpoint.

    Args:
        choose: what chooses.
        bait: a path outside of the checkpoint, where a file and a pipe are.
        kind: type of model; none: any, half of the time one that generates text.
        sizes: entries in place of the default ones.
    """
    config = json.loads(json.dumps(config_of(kind or choose.choice(choose.choice([kinds(), generating()]))))) | sizes
    if choose.random() < 0.8:
        shrink(config)
    config_of_tokenizer: dict[str, Any] = {
        "tokenizer_class": choose.choice([choose.choice(classes()), choose.choice(COMMON_CLASSES), None]),
        "eos_token": "</s>",
    }
    tokenizer = json.loads(tokenizer_json())
    special = {"bos_token": "<s>"}
    # Mostly one attack: another one is a reason to be refused before it.
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        match choose.randint(0, 5):
            case 0:
                name_places(choose, choose.choice([config_of_tokenizer, config_of_tokenizer, special]), bait)
            case 1:
                name_places(choose, config, bait)
            case 2:
                ask_for_much(choose, config)
            case 3:
                ask_for_much(choose, config_of_tokenizer)
                config_of_tokenizer[choose.choice(sorted(SAFE - {"tokenizer_class"}))] = much(choose)
            case 4:
                do_too_much(choose, tokenizer)
            case 5:
                config_of_tokenizer[choose.choice([*sorted(SAFE - {"tokenizer_class"}), *sorted(FOLLOWED)[:3]])] = (
                    place(choose, bait)
                )
    files = {
        "model.safetensors": save(TENSORS),
        "config.json": json.dumps(config).encode(),
        "tokenizer_config.json": json.dumps(config_of_tokenizer).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
    }
    if choose.random() < 0.5:
        files["tokenizer.json"] = json.dumps(tokenizer).encode()
    if choose.random() < 0.4:
        files |= vocabularies()
    if choose.random() < 0.2:
        # Another file in place of one that a class reads.
        files[choose.choice(sorted(vocabularies()))] = choose.choice(sorted(files.values()))
    return files


@cache
def vocabularies() -> Files:
    """Files that older classes read."""
    vocabulary = json.loads(tokenizer_json())["model"]["vocab"]
    table, lines = json.dumps(vocabulary).encode(), "\n".join(vocabulary).encode()
    return {
        **dict.fromkeys(("vocab.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json"), table),
        **dict.fromkeys(("vocab.txt", "dict.txt", "tokenizer.model", "spiece.model", "source.spm"), lines),
        **dict.fromkeys(("merges.txt", "bpe.codes", "added_tokens.txt"), b"#version: 0.2\n"),
        "added_tokens.json": b'{"<extra>": 300}',
        "tekken.json": b'{"config": {}, "vocab": [], "special_tokens": []}',
        "generation_config.json": b'{"eos_token_id": 1}',
    }


def shrink(config: dict[str, Any]) -> None:
    """Make a default config small, since it is built many times."""
    for inside, key in places(config):
        if COUNT.search(str(key)) and isinstance(inside[key], int) and inside[key] > 2:
            inside[key] = 2


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """All entries and elements of nested objects and lists: what each is in, and its key."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from places(value)


def name_places(choose: random.Random, config: dict[str, Any], bait: str) -> None:
    if choose.random() < 0.5:
        # Most classes open a file only where others are named, too.
        several = {"vocab", "merges", *choose.sample(PLACES[:8], 3)}
        config |= dict.fromkeys(several, bait + choose.choice(["/file", "/pipe", "/file.json", "/pipe.json"]))
        return
    inside, key = choose.choice(list(places(config)))
    if isinstance(inside, dict) and choose.random() < 0.7:
        inside[choose.choice(PLACES)] = place(choose, bait)
    else:
        inside[key] = place(choose, bait)


def place(choose: random.Random, bait: str) -> Any:
    """A value that names the bait."""
    name = bait + choose.choice(["/file", "/pipe", "/file.json", "/pipe.json", "/folder", "/tokenizer.model", ""])
    name = choose.choice(["", "", "", "", "file://", "local-dir:", "~/../..", "../../../../.."]) + name
    key = choose.choice([*PLACES, "model_file", "checkpoint_path", "mecab_option", "sudachi_config_path", "path"])
    return choose.choice([name, name, name, [name], {key: name}, [{key: name}], [[name]], {"a": {key: name}}, 0])


def ask_for_much(choose: random.Random, config: dict[str, Any]) -> None:
    inside, key = choose.choice(list(places(config)))
    if isinstance(inside, dict) and choose.random() < 0.2:
        key = choose.choice(["num_labels", "per_layer_config", "sub_config", "layer_types", "attention_types", "x"])
    inside[key] = much(choose)


def much(choose: random.Random) -> Any:
    number = choose.choice(HUGE)
    return choose.choice(
        [
            *(number, number, number, float(number), -number, str(number), [number], [[number]] * 3, [[["a"], number]]),
            *([["full_attention", "local"], number], ["full_attention"] * 5000, {"a": number}, [number] * 1000),
            *({str(n): {"model_type": "llava"} for n in range(100)}, nested(choose.choice([20, 200])), "a" * 10**5),
            *({"model_type": choose.choice(kinds())}, {"model_type": choose.choice(kinds()), "num_labels": number}),
        ]
    )


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {"model_type": "vision-encoder-decoder"}
    for _ in range(depth):
        content = {"model_type": "vision-encoder-decoder", "encoder": content, "decoder": {"model_type": "llava"}}
    return content


def do_too_much(choose: random.Random, tokenizer: dict[str, Any]) -> None:
    """Change what a tokenizer does with a text."""
    length = choose.choice([1, 10, 200, 1000, 10**5, 10**6])
    pattern = {choose.choice(["Regex", "String"]): choose.choice(PATTERNS)}
    normalizer = choose.choice(
        [
            {"type": "Replace", "pattern": pattern, "content": "a" * length},
            {"type": "Prepend", "prepend": "a" * length},
            {"type": "Precompiled", "precompiled_charsmap": choose.choice(["AAAA", "AAECAwQF" * length, ""])},
            {"type": choose.choice(["NFKD", "NFC", "Lowercase", "ByteLevel", "StripAccents"])},
        ]
    )
    cut = choose.choice(
        [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": choose.random() < 0.5},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Metaspace", "replacement": "_" * min(length, 5), "prepend_scheme": "always", "split": True},
            {"type": "Digits", "individual_digits": True},
        ]
    )
    count = choose.choice([1, 1, 5, 30, 500, 10**4])
    depth = choose.choice([1, 1, 3, 15, 100])
    match choose.randint(0, 5):
        case 0:
            tokenizer["normalizer"] = sequence("normalizers", normalizer, count, depth)
        case 1:
            tokenizer["pre_tokenizer"] = sequence("pretokenizers", cut, count, depth)
        case 2:
            piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
            tokenizer["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [piece] * count + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [256] * count, "tokens": ["<s>"] * count}},
            }
        case 3:
            side = choose.choice(["Left", "Right"])
            tokenizer["padding"] = {
                "strategy": {"Fixed": choose.choice(HUGE)},
                "direction": side,
                "pad_to_multiple_of": choose.choice([None, *HUGE]),
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "a" * length},
            }
        case 4:
            tokenizer["added_tokens"] += [
                {"id": n, "content": "b" * length + str(n), "special": False, "normalized": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
                for n in (300, choose.choice(HUGE))
            ]
        case 5:
            tokenizer["model"] |= {
                choose.choice(
                    ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"]
                ): choose.choice([0.5, "a" * length, number_of(choose), None]),
                "byte_fallback": True,
            }


def number_of(choose: random.Random) -> int:
    return choose.choice(HUGE)


def sequence(name: str, component: dict[str, Any], count: int, depth: int) -> dict[str, Any]:
    """A component many times, in nested sequences."""
    # Files of at most some MB.
    content = {"type": "Sequence", name: [component] * min(count, 4 * 10**6 // len(str(component)) + 1)}
    for _ in range(depth - 1):
        content = {"type": "Sequence", name: [content]}
    return content
