"""The class that is built, the blocks that are found in it, and errors out of its own code."""

import pytest
import torch
from classes.tiny_model import byte_tokenizer
from helpers.checkpoints import refused
from helpers.families import TOKENS, change_config, first_is_fast, save_model
from helpers.stacks import drawn
from helpers.whole import streamed
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    Qwen3_5Config,
    RobertaConfig,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    XLNetConfig,
)

from sparsefw.checkpoint.source import inspect
from sparsefw.errors import InputError
from sparsefw.estimate.profile import shape_of
from sparsefw.model.forward import embed
from sparsefw.model.skeleton import class_of, max_seqlen


def save(folder, config, make=AutoModelForCausalLM.from_config):
    torch.manual_seed(0)
    make(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "named", "built", "text_only"),
    [
        (LlamaConfig, ["LlamaForCausalLM"], "LlamaForCausalLM", False),
        # Classes of other models, of no model, and what is no class.
        (LlamaConfig, ["Qwen3ForCausalLM"], "LlamaForCausalLM", False),
        (LlamaConfig, ["AutoModelForCausalLM", "os.system", ""], "LlamaForCausalLM", False),
        # A class of text alone is listed for the whole config, too.
        (Qwen3_5Config, ["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration", False),
        (Qwen3_5Config, ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM", True),
        (Qwen3_5Config, None, "Qwen3_5ForCausalLM", True),
    ],
)
def test_the_class_that_is_built(config, named, built, text_only, tmp_path):
    config = config()
    config.architectures = named
    kind, taken = class_of(config, tmp_path)
    assert kind.__name__ == built
    assert kind.__module__.startswith("transformers.")
    assert type(taken) is (type(config.get_text_config()) if text_only else type(config))


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    message = r"cannot load .*: %s has a decoder that reads an encoder's output; give a model that generates"
    sizes = dict(vocab_size=258, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    folder = save(tmp_path / "t5", AutoConfig.for_model("t5", **sizes), AutoModelForSeq2SeqLM.from_config)
    with refused(message % "T5ForConditionalGeneration"):
        streamed(folder)
    # Its checkpoint has all tensors of a decoder that runs alone.
    config = drawn("whisper")[0].config
    folder = save(tmp_path / "whisper", config, WhisperForConditionalGeneration)
    with refused(message % "WhisperForConditionalGeneration"):
        streamed(folder)
    change_config(folder, architectures=None)
    with refused(message % "whisper"):
        streamed(folder)
    alone = save(tmp_path / "alone", config, WhisperForCausalLM)
    assert not streamed(alone).notes


@pytest.mark.parametrize(
    ("family", "auto", "message"),
    [
        ("bert", AutoModel, "unsupported architecture: BertModel generates no text"),
        ("llama", AutoModel, "missing from .*: LlamaModel generates no text"),
    ],
)
def test_a_class_that_generates_no_text_is_refused(family, auto, message, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    folder = save(tmp_path / family, AutoConfig.for_model(family, **sizes), auto.from_config)
    with refused(message):
        streamed(folder)


def test_blocks_are_what_the_forward_calls_one_after_the_other(tmp_path):
    """Its blocks are of two lists, and its layers of no other list."""
    sizes = dict(vocab_size=258, emb_dim=32, n_layers=1, n_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    with streamed(save(tmp_path, AutoConfig.for_model("xlm", **sizes))) as model:
        assert model.names == ["transformer.attentions.0", "transformer.ffns.0"]
        assert not model.unused


def test_the_most_tokens():
    """RoBERTa's positions begin after its padding token's number, 1."""
    assert max_seqlen(XLNetConfig()) is None
    assert max_seqlen(RobertaConfig(max_position_embeddings=66)) == 64


@pytest.mark.parametrize(
    "error", first_is_fast([KeyError("sound"), IndexError("list\nindex"), InputError("own"), MemoryError()], 3)
)
def test_an_error_of_a_block_is_one_line(error, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    folder, passes = save_model(tmp_path, "llama"), isinstance(error, InputError | MemoryError)
    with streamed(folder) as model:
        states = embed(model, TOKENS, 6)
        model.open(1)
        monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fails)
        with pytest.raises(type(error) if passes else InputError) as caught:
            states.output(1, 0)
    if passes:
        assert caught.value is error
        return
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith("unsupported model LlamaForCausalLM: model.layers.1 ")
    with refused(r"model\.layers\.0 "):
        shape_of(inspect(folder))
