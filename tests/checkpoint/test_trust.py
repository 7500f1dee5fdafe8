"""Entries of a checkpoint's files: refused if transformers would do something unchecked, accepted from real models."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import FAMILIES, save_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsefw.checkpoint import tokenizer_trust, trust
from sparsefw.checkpoint.files import parse_object
from sparsefw.checkpoint.source import inspect
from sparsefw.errors import InputError

CONFIG = Path("config.json")

# parse_object


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"x": [{"a": 1, "b": 2, "a": 3}]}', '{"a": 1, "\\u0061": 2}'])
def test_a_key_stands_once(text):
    with refused("^config.json: a is in it twice; keep one$"):
        parse_object(text.encode(), CONFIG)


@pytest.mark.parametrize("text", [b"\xff", b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b"[" * 10**5, b"1" * 5000])
def test_what_is_no_json(text):
    with refused("^config.json: not JSON") as caught:
        parse_object(text, CONFIG)
    assert str(caught.value).isprintable()


# check_config


def nested(depth: int) -> dict:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("key", trust.REFUSED)
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"text_config": c}, lambda c: {"x": [[{"y": c}]]}])
def test_entries_that_lead_elsewhere(key, wrap):
    with refused(rf"^config.json: .* \({key}\)$"):
        trust.check_config(wrap({key: {"a": 1}}), CONFIG)
    trust.check_config(wrap({key: None}), CONFIG)


@pytest.mark.parametrize("config", [{"a": "\x1b[31m"}, {"\x07": 1}, {"x": [{"a": "\x9b"}]}])
def test_control_characters(config):
    with refused("^config.json: control characters in .*; remove them$") as caught:
        trust.check_config(config, CONFIG)
    assert str(caught.value).isprintable()
    trust.check_config({"chat_template": "{% if a %}\n\tb\r\n{% endif %}\u3000"}, CONFIG)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_on_the_hub(key):
    for value in ("org/kernel", {"text_config": "org/kernel@main"}):
        with refused(f"^config.json: {key} .* is code on the Hub, which is never run"):
            trust.check_config({"a": {key: value}}, CONFIG)
    trust.check_config({key: "flash_attention_2"}, CONFIG)


def test_models_made_of_many_models():
    parts = [{"model_type": "llava"}] * trust.MODELS_ALLOWED
    trust.check_config({"x": parts}, CONFIG)
    with refused("^config.json: made of more than 64 models, which no model is$"):
        trust.check_config({"model_type": "llava", "x": parts}, CONFIG)


def test_places_that_timm_would_open():
    for model in ("local-dir:/tmp/x", "hf-hub:org/name"):
        with refused("^config.json: architecture .* is a model elsewhere; remove the entry$"):
            trust.check_config({"vision_config": {"architecture": model}}, CONFIG)
    for key in ("checkpoint_path", "pretrained_cfg", "cache_dir"):
        with refused(rf"^config.json: model_args names a file or a place \({key}\); remove the entry$"):
            trust.check_config({"vision_config": {"model_args": {"depth": 2, key: "x"}}}, CONFIG)
    args = {"embed_dim": 1024, "img_size": [448, 448], "global_pool": "", "init_values": 0.1}
    trust.check_config({"architecture": "vit_pe_core_large_patch14_336", "model_args": args}, CONFIG)


def test_depth():
    trust.check_config(nested(trust.MAX_DEPTH - 1), CONFIG)
    with refused("config.json: nested more than 32 deep"):
        trust.check_config(nested(trust.MAX_DEPTH), CONFIG)
    with refused("config.json: nested more than 32 deep"):
        trust.check_config({"a": json.loads("[" * 500 + "]" * 500)}, CONFIG)


def test_the_other_config_is_what_transformers_would_read(tmp_path):
    # Shows why configuration_files is refused: transformers reads the other file.
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").rename(tmp_path / "config.4.0.0.json")
    content = json.loads((tmp_path / "config.json").read_text()) | {"configuration_files": ["config.4.0.0.json"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"


# check_sizes


@pytest.mark.parametrize(
    "entry",
    [
        {"num_hidden_layers": 10**6},
        {"n_layer": 1025},
        {"decoder_layers": 1e5},
        {"num_layers_per_stack": 2000},
        {"audio_config": {"num_blocks": 10**5}},
        {"layer_types": ["full_attention"] * 2000},
        {"hybrid_override_pattern": "M" * 2000},
    ],
)
def test_more_layers_than_tensors(entry):
    with refused(r"^config.json: \w+ asks for \S+ parts, but there are 3 tensors$"):
        trust.check_sizes({"x": entry}, CONFIG, [(2**30, 1)] * 3)
    trust.check_sizes({"x": entry}, CONFIG, [(1,)] * 10**6)


def test_numbers_in_lists_count_as_numbers():
    for value in ([2**40], [[["global", "local"], 2**40]], [{"y": [[2**40]]}]):
        with refused(r"^config.json: \w+ is 1099511627776, but no tensor is larger than 7 in any way$"):
            trust.check_sizes({"attention_types": value}, CONFIG, [(7,)])
    trust.check_sizes({"rope_thetas": [2**40], "attention_types": [[["global"], 24]]}, CONFIG, [(7,)])


def test_more_classes_than_any_model_tells_apart():
    told = r"classes \(num_labels, num_classes, id2label\), more than any model has$"
    for key in ("num_labels", "num_classes"):
        with refused(f"^config.json: 1048576 {told}"):
            trust.check_sizes({"vision_config": {key: 2**20}}, CONFIG, [(2**40,)])
    names = {str(n): n for n in range(21841)}
    real = {"num_labels": 21841, "id2label": names, "label2id": names}
    trust.check_sizes(real, CONFIG, [(7,)])
    # Each of them alone would pass.
    for more in ({"num_labels": 100}, {"id2label": {"a": 0} | names}):
        with refused(f"^config.json: \\d+ {told}"):
            trust.check_sizes(real | {"text_config": more}, CONFIG, [(7,)])


def test_layers_that_are_without_number():
    with refused("^config.json: n_layers asks for inf parts"):
        trust.check_sizes(json.loads('{"n_layers": 1e999}'), CONFIG, [(1,)])


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "head_dim", "num_attention_heads", "num_experts", "x"])
def test_more_than_any_dimension(key):
    with refused(rf"^config.json: {key} is 1099511627776, but no tensor is larger than 7 in any way$"):
        trust.check_sizes({key: 2**40}, CONFIG, [(7, 2), (0, 2**47)])
    trust.check_sizes({key: 2**40}, CONFIG, [(2**40, 1)])


REAL = {
    "Llama-3.1-405B": {"num_hidden_layers": 126, "vocab_size": 128256, "rope_theta": 500000.0, "hidden_size": 16384},
    "Llama-4-Scout": {
        "text_config": {
            **{"max_position_embeddings": 10485760, "num_local_experts": 16, "attention_chunk_size": 8192},
            **{"no_rope_layers": [1, 1, 1, 0] * 12, "rope_scaling": {"original_max_position_embeddings": 8192}},
        }
    },
    "DeepSeek-V3": {"n_routed_experts": 256, "num_hidden_layers": 61, "vocab_size": 129280, "rope_theta": 10000},
    "Qwen2.5-7B-1M": {"max_position_embeddings": 1010000, "rope_theta": 10000000, "max_window_layers": 28},
    "Gemma-3-27B": {"text_config": {"vocab_size": 262208, "num_hidden_layers": 62}, "image_token_index": 262144},
    "a long context": {"rope_theta": 500_000_000, "sliding_window": 2**22, "rope_local_base_freq": 10_000_000},
    "Nemotron-H": {"hybrid_override_pattern": "M-M-M-M*-" * 12, "time_step_limit": [0.0, float("inf")]},
    "saved by an old version": {"pretraining_tp": 1, "task_specific_params": {"x": {}}, "id2label": {"0": "L"}},
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_pass(name):
    trust.check_config(REAL[name], CONFIG)
    trust.check_sizes(REAL[name], CONFIG, [(1000, 100)] * 100)
    tokenizer_trust.check_tokenizer(REAL[name], CONFIG)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family, tmp_path):
    assert inspect(save_model(tmp_path, family)).config["model_type"]


@pytest.mark.slow
def test_defaults_of_transformers_pass():
    count = 0
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        except StrictDataclassError:
            # This config has no valid default.
            continue
        trust.check_config(config, CONFIG)
        trust.check_sizes(config, CONFIG, [(1,)])
        tokenizer_trust.check_tokenizer(config, CONFIG)
        count += 1
    assert count > 100


# bounded


def build(layers: int, tensors: int) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, hidden_size=32, vocab_size=8)
    with torch.device("meta"), trust.bounded(tensors):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.slow
def test_a_model_far_larger_than_its_checkpoint_is_not_built():
    with refused("^config.json asks for a model of more than 16384 parts for 3 tensors$"):
        build(1100, 3)
    build(2, 3)
    # One layer has nine tensors.
    build(1100, 9900)


def test_memory_is_limited_while_a_model_is_built():
    with refused("^config.json asks for a model of more than 8 GiB without its weights$"), trust.bounded(3):
        [None] * 2**31
    # Not what comes later: the memory is only asked for.
    torch.empty(2**33, dtype=torch.int8)


@pytest.mark.slow
def test_what_is_built_later_is_not_counted():
    with pytest.raises(InputError), trust.bounded(0):
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(20000))
    assert len(torch.nn.ModuleList(torch.nn.Identity() for _ in range(20000))) == 20000
