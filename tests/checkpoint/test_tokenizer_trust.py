"""Entries of a tokenizer's files: those that transformers would follow are refused or left out, others are kept."""

import json
from pathlib import Path

import pytest
from helpers.checkpoints import refused

from sparsefw.checkpoint import tokenizer_trust
from sparsefw.checkpoint.tokenizer_trust import FOLLOWED, MAX_COMPONENTS, MAX_NESTED, SAFE, check_pipeline, handed_on
from sparsefw.inputs import DEFAULT_MODEL

CONFIG = Path("config.json")

# check_tokenizer


@pytest.mark.parametrize(
    "name",
    [
        *(
            "LlamaForCausalLM",
            "LlamaForCausalLMFast",
            "LlamaForCausalLMFastFast",
            "AutoModel",
            "BertModel",
            "AutoConfig",
        ),
        *("AutoTokenizer", "AutoTokenizerFast", "RagTokenizer", "AutoProcessor", "Trainer", "pipeline", "utils"),
        *("LlavaImageProcessor", "LlavaImageProcessorFastFast", "__name__", 3, [], {}, True),
    ],
)
def test_what_is_no_tokenizer(name):
    with refused("^config.json: tokenizer_class .* is not the name of a tokenizer$"):
        tokenizer_trust.check_tokenizer({"tokenizer_class": name}, CONFIG)


@pytest.mark.parametrize(
    "name",
    [
        *("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer"),
        *("Qwen2Tokenizer", "GemmaTokenizerFast", "MistralCommonBackend", "BloomTokenizerFast", "T5Tokenizer"),
        *("SomebodysTokenizer", "TikTokenWrapper", "", None),
    ],
)
def test_what_is_a_tokenizer(name):
    tokenizer_trust.check_tokenizer({"tokenizer_class": name}, CONFIG)


@pytest.mark.parametrize("config", [{"model_type": "rag"}, {"encoder": {"model_type": "rag"}}])
def test_models_whose_tokenizer_has_parts(config):
    with refused("^config.json: models of type rag have no tokenizer that can be trusted$"):
        tokenizer_trust.check_tokenizer(config, CONFIG)
    tokenizer_trust.check_tokenizer({"model_type": "llama", "text_config": {"model_type": "nobody's"}}, CONFIG)


@pytest.mark.parametrize("files", [["../x"], ["/x"], ["a\\b"], ["x\n"], [".."], [""], [3], 3, "tokenizer.json"])
def test_tokenizer_files_elsewhere(files):
    with refused("^config.json: fast_tokenizer_files .* are not names of files beside it$") as caught:
        tokenizer_trust.check_tokenizer({"fast_tokenizer_files": files}, CONFIG)
    assert str(caught.value).isprintable()
    tokenizer_trust.check_tokenizer({"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]}, CONFIG)


# check_followed, handed_on


@pytest.mark.parametrize("key", sorted(FOLLOWED))
def test_entries_that_are_followed(key):
    with refused(f"^config.json: {key} .* would be followed out of the checkpoint; remove the entry"):
        tokenizer_trust.check_followed({key: "/etc/passwd"}, CONFIG)
    for empty in (None, {}, [], ""):
        tokenizer_trust.check_followed({key: empty}, CONFIG)


@pytest.mark.parametrize("key", ["vocab_file", "name_or_path", "token", "x", *sorted(FOLLOWED)])
def test_only_known_entries_are_handed_on(key):
    assert key not in SAFE
    assert handed_on({key: "/etc/passwd", "add_bos_token": True}) == {"add_bos_token": True}


def test_special_tokens_are_handed_on():
    tokens = {"eos_token": "</s>", "image_token": {"content": "<i>", "__type": "AddedToken"}, "pad_token": None}
    assert handed_on(tokens) == tokens
    assert handed_on({"x_token": ["/etc/passwd"], "y_token": 0}) == {}


# check_pipeline


def test_real_pipelines_pass():
    check_pipeline(json.loads((DEFAULT_MODEL / "tokenizer.json").read_text()), CONFIG)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": "\\p{L}+|" * 250}, "behavior": "Isolated", "invert": False}
    check_pipeline(
        {
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 400_000},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, split, byte_level]},
            "model": {"vocab": {"a" * 10**5: 0}},
        },
        CONFIG,
    )


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder", "post_processor"])
def test_more_components_than_any_tokenizer_has(part):
    component = {"type": "Replace"}
    check_pipeline({part: {"x": [component] * (MAX_COMPONENTS - 2)}}, CONFIG)
    with refused("^config.json: more than 1000 components, or nested more than 16 deep"):
        check_pipeline({part: {"x": [component] * MAX_COMPONENTS}}, CONFIG)
    for _ in range(MAX_NESTED // 2):
        component = {"type": "Sequence", "x": [component]}
    with refused("^config.json: more than 1000 components, or nested more than 16 deep"):
        check_pipeline({part: component}, CONFIG)


@pytest.mark.parametrize("key", ["content", "prepend", "prefix"])
def test_replacements_longer_than_any_tokenizer_has(key):
    check_pipeline({"normalizer": {"x": [{key: "a" * 256}]}}, CONFIG)
    with refused(f"^config.json: {key} has 257 characters, more than any tokenizer has$"):
        check_pipeline({"normalizer": {"x": [{key: "a" * 257}]}}, CONFIG)


@pytest.mark.parametrize("content", [[], 3, "x", None])
def test_no_object(content):
    with refused("^config.json: expected a JSON object"):
        check_pipeline(content, CONFIG)
