"""Described models: a config says as much as its checkpoint."""

import json

import pytest
import torch
from helpers.families import FAMILIES, config_of, first_is_fast, save_model
from transformers import AutoConfig

from sparsefw.checkpoint.source import inspect
from sparsefw.estimate.plan import describe
from sparsefw.estimate.profile import shape_of


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_says_as_much_as_its_checkpoint(family, tmp_path):
    source = save_model(tmp_path / "model", family, torch.bfloat16)
    whole, alone = describe(str(source)), describe(str(config_of(source, tmp_path / "config")))
    assert whole == alone
    assert alone.dtype == torch.bfloat16
    loaded = AutoConfig.from_pretrained(source)
    (tmp_path / "other.json").write_text(json.dumps(loaded.to_dict()))
    assert describe(str(tmp_path / "other.json")).shape == alone.shape


@pytest.mark.parametrize("family", first_is_fast(["qwen3_moe", "llama", "mixtral"]))
def test_experts_are_joined_of_as_many_bytes_as_in_the_checkpoint(family, tmp_path):
    """A config does not say how a checkpoint stores them: each is taken for a tensor of its own, as it is here."""
    source = save_model(tmp_path / "model", family, torch.bfloat16)
    joined = describe(str(config_of(source, tmp_path / "config"))).shape.joined_bytes
    assert joined == shape_of(inspect(source)).joined_bytes
    assert (joined > 0) == (family != "llama")


def test_a_tied_tensor_is_written_once(tmp_path):
    source = save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    described = describe(str(config_of(source, tmp_path / "config")))
    assert sum(described.shape.pieces) == sum(shape_of(inspect(source)).pieces)


def test_the_dtype(tmp_path):
    """The dtype is that of the weights if there are some, else the config's, else bf16 with a note."""
    source = save_model(tmp_path / "model", "llama", torch.float16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    alone = config_of(source, tmp_path / "config")
    assert (describe(str(source)).dtype, describe(str(alone)).dtype) == (torch.float16, torch.float32)
    (alone / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    described = describe(str(alone))
    assert described.dtype == torch.bfloat16
    assert "names no dtype of weights that can be pruned: taken for torch.bfloat16" in described.notes[0]
