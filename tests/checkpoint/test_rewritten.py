"""Files that are not copied byte by byte: only some entries go, and everything else is as it was."""

import json

import pytest

from sparsefw.checkpoint.rewritten import rewritten

FP8 = {"quant_method": "fp8"}


@pytest.fixture
def changed(folder):
    """changed(config, tokenizer_config) -> the files that are written in place of these, parsed."""

    def write(config: dict, tokenizer: dict | None = None) -> dict[str, dict]:
        for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            if content is not None:
                (folder / name).write_text(json.dumps(content))
        return {name: json.loads(text) for name, text in rewritten(folder).items()}

    return write


def test_nothing_is_rewritten_without_need(changed):
    config = {
        "model_type": "llama",
        "dtype": "float8_e4m3fn",
        "time_step_limit": [0.0, float("inf")],
        "x": float("nan"),
    }
    assert changed(config, {"model_max_length": 10**30, "quantization_config": 3}) == {}


def test_entries_that_name_code(changed):
    auto_map = {"AutoConfig": "x.C"}
    config = {"b": 1, "auto_map": auto_map, "a": {"auto_map": auto_map, "c": [{"auto_map": 1, "d": 2}]}}
    assert changed(config, {"auto_map": auto_map, "chat_template": "é\n"}) == {
        "config.json": {"b": 1, "a": {"c": [{"d": 2}]}},
        "tokenizer_config.json": {"chat_template": "é\n"},
    }


def test_the_quantization(changed):
    config = {"model_type": "llama", "quantization_config": FP8, "dtype": "bfloat16"}
    assert changed(config) == {"config.json": {"model_type": "llama", "dtype": "bfloat16"}}
    config = {"text_config": {"quantization_config": FP8, "a": 1}, "torch_dtype": "float8_e4m3fn"}
    assert changed(config) == {"config.json": {"text_config": {"a": 1}}}


def test_the_order_and_the_form_stay(folder, changed):
    changed({"z": 1e-6, "auto_map": {}, "a": [1, 2.0], "m": {"é": None}})
    assert rewritten(folder)["config.json"] == (
        '{\n  "z": 1e-06,\n  "a": [\n    1,\n    2.0\n  ],\n  "m": {\n    "\\u00e9": null\n  }\n}\n'
    )
