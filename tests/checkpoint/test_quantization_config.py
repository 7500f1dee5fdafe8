"""Quantization configs: those of real models are read, all others are refused in a line that names the entry."""

from pathlib import Path

import pytest
from helpers.checkpoints import refused

from sparsefw.checkpoint import quantization, trust

PATH = Path("config.json")


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"quant_method": "\x1b[31m"}, r"\\x1b\[31m"),
        ({"quant_method": ["fp8"]}, r"\['fp8'\]"),
        ({"group_size": 64, "bits": 4}, "an unnamed method"),
    ],
)
def test_other_methods(content, name, inner):
    config = {"quantization_config": content}
    with refused(
        rf"^config.json: the model is quantized by {name}, which is not read; "
        r"give the unquantized checkpoint that it was made from \(quantization_config\)$"
    ):
        quantization.quantization_of({"text_config": config} if inner else config, PATH)


def test_compressed_tensors():
    for config in (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {"compression_config": {"format": "x"}},
    ):
        with refused(r"^config.json: .*compressed-tensors.*, or dequantize it first with the tool that made it \("):
            trust.check_config(config, PATH)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.parametrize(
    "entry",
    [
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": [128, True]},
        {"weight_block_size": [128, 10**9]},
        {"weight_block_size": "128"},
        {"weight_block_size": {"0": 1}},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
        {"modules_to_not_convert": ["x" * 1000]},
        {"modules_to_not_convert": ["\x1b[31m"]},
        {"ignored_layers": {}},
        {"activation_scheme": "other"},
        {"expert_dtype": "fp4"},
        {"scale_fmt": 1},
        {"dequantize": 1},
        {"dequantize": "org/name"},
        {"modules_to_import": ["os"]},
        {"_name_or_path": "x"},
    ],
)
def test_entries_that_no_real_config_has(method, entry):
    with refused(
        rf"^config.json: {next(iter(entry))} .* is not what {method} has; .* \(quantization_config\)$"
    ) as caught:
        trust.check_config({"quantization_config": {"quant_method": method} | entry}, PATH)
    assert str(caught.value).isprintable()


REAL = [
    {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "ignored_layers": None},
    {
        **{"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None},
        **{"modules_to_not_convert": ["model.vision_tower", "lm_head"]},
    },
    {"quant_method": "fp8", "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate"]},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
]


@pytest.mark.parametrize("content", REAL)
def test_real_configs(content):
    for config in ({"quantization_config": content}, {"text_config": {"quantization_config": content}}):
        trust.check_config(config, PATH)
        parsed = quantization.quantization_of(config, PATH)
        block = content.get("weight_block_size", (128, 128)) if content["quant_method"] == "fp8" else None
        assert (parsed.method, parsed.block) == (content["quant_method"], block and tuple(block))


def test_quantized_in_other_places():
    with refused(r"^config.json: a part of the model is quantized by itself; .* \(quantization_config\)$"):
        trust.check_config({"vision_config": {"quantization_config": REAL[0]}}, PATH)
    with refused("^config.json: the text_config is quantized in another way than the rest"):
        trust.check_config({"quantization_config": REAL[0], "text_config": {"quantization_config": REAL[2]}}, PATH)
    with refused("^config.json: quantization_config is fp8, not an object"):
        trust.check_config({"quantization_config": "fp8"}, PATH)
    assert quantization.quantization_of({"quantization_config": None}, PATH) is None
