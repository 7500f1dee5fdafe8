"""Described models: a config says as much as its checkpoint."""

import json

import pytest
import torch
from helpers.families import config_of, first_is_fast, save_model
from transformers import AutoConfig

from sparsefw.checkpoint.source import inspect
from sparsefw.estimate.plan import describe
from sparsefw.estimate.profile import shape_of


@pytest.mark.parametrize("family", first_is_fast(["qwen3_moe", "mixtral", "llama", "gemma3_text", "opt"]))
def test_a_config_says_as_much_as_its_checkpoint(family, tmp_path):
    """Of experts, too: each is taken for a tensor of its own. A tied tensor is written once."""
    source = save_model(tmp_path / "model", family, torch.bfloat16)
    whole, alone = describe(str(source)), describe(str(config_of(source, tmp_path / "config")))
    assert whole == alone
    assert alone.dtype == torch.bfloat16
    assert alone.shape.joined_bytes == shape_of(inspect(source)).joined_bytes
    assert (alone.shape.joined_bytes > 0) == (family in ("qwen3_moe", "mixtral"))
    (tmp_path / "other.json").write_text(json.dumps(AutoConfig.from_pretrained(source).to_dict()))
    assert describe(str(tmp_path / "other.json")).shape == alone.shape


def test_the_dtype(tmp_path):
    """The dtype is that of the weights if there are some, else the config's, else bf16."""
    source = save_model(tmp_path / "model", "llama", torch.float16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    alone = config_of(source, tmp_path / "config")
    assert (describe(str(source)).dtype, describe(str(alone)).dtype) == (torch.float16, torch.float32)
    (alone / "config.json").write_text(json.dumps(config))
    assert describe(str(alone)).dtype == torch.bfloat16
