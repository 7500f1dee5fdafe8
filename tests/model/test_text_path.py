"""The class that is built, the blocks that are found in it, and errors out of its own code."""

import json

import pytest
import torch
from classes.tiny_model import byte_tokenizer
from helpers.families import first_is_fast, save_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    LlamaConfig,
    Qwen3_5Config,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    XLNetConfig,
)

from sparsefw.checkpoint.source import inspect
from sparsefw.errors import InputError
from sparsefw.estimate.profile import shape_of
from sparsefw.model import StreamedModel, embed
from sparsefw.model.skeleton import class_of, max_seqlen

IDS = torch.randint(2, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def streamed(folder):
    return StreamedModel(inspect(folder), torch.device("cpu"))


def save(folder, config, make=AutoModelForCausalLM.from_config):
    torch.manual_seed(0)
    make(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestClass:
    @pytest.mark.parametrize(
        ("config", "named", "built", "text_only"),
        [
            (LlamaConfig, ["LlamaForCausalLM"], "LlamaForCausalLM", False),
            (LlamaConfig, None, "LlamaForCausalLM", False),
            # Classes of other models, of no model, and what is no class.
            (LlamaConfig, ["Qwen3ForCausalLM"], "LlamaForCausalLM", False),
            (LlamaConfig, ["AutoModelForCausalLM", "os.system", ""], "LlamaForCausalLM", False),
            (LlamaConfig, ["LlamaForSequenceClassification"], "LlamaForCausalLM", False),
            (Gemma3Config, ["Gemma3ForConditionalGeneration"], "Gemma3ForConditionalGeneration", False),
            (Gemma3Config, ["Gemma3ForCausalLM"], "Gemma3ForCausalLM", True),
            # A class of text alone is listed for the whole config, too.
            (Qwen3_5Config, ["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration", False),
            (Qwen3_5Config, ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM", True),
            (Qwen3_5Config, None, "Qwen3_5ForCausalLM", True),
        ],
    )
    def test_that_is_built(self, config, named, built, text_only, tmp_path):
        config = config()
        config.architectures = named
        kind, taken = class_of(config, tmp_path)
        assert kind.__name__ == built
        assert kind.__module__.startswith("transformers.")
        assert type(taken) is (type(config.get_text_config()) if text_only else type(config))

    def test_another_one_than_the_config_names_is_noted(self, tmp_path):
        folder = save_model(tmp_path, "llama")
        change_config(folder, architectures=["LlamaForTokenClassification"])
        assert "config.json names LlamaForTokenClassification: pruned as LlamaForCausalLM" in streamed(folder).notes
        change_config(folder, architectures=["LlamaForCausalLM"])
        assert not streamed(folder).notes

    def test_encoder_and_decoder(self, tmp_path):
        message = r"cannot load .*: %s has a decoder that reads an encoder's output; give a model that generates"
        sizes = dict(vocab_size=258, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        folder = save(tmp_path / "t5", AutoConfig.for_model("t5", **sizes), AutoModelForSeq2SeqLM.from_config)
        with pytest.raises(InputError, match=message % "T5ForConditionalGeneration"):
            streamed(folder)
        # Its checkpoint has all tensors of a decoder that runs alone.
        sizes = dict(d_model=32, num_mel_bins=8, max_source_positions=16, max_target_positions=64)
        ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0)
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
        config = AutoConfig.for_model("whisper", vocab_size=258, **sizes, **ids)
        folder = save(tmp_path / "whisper", config, WhisperForConditionalGeneration)
        with pytest.raises(InputError, match=message % "WhisperForConditionalGeneration"):
            streamed(folder)
        change_config(folder, architectures=None)
        with pytest.raises(InputError, match=message % "whisper"):
            streamed(folder)
        alone = save(tmp_path / "alone", config, WhisperForCausalLM)
        assert not streamed(alone).notes

    def test_no_class_that_generates_text(self, tmp_path):
        config = AutoConfig.for_model("vit")
        config.architectures = ["ViTModel"]
        message = "unsupported architecture: ViTModel generates no text; "
        with pytest.raises(InputError, match=message) as refused:
            class_of(config, tmp_path)
        assert f"model = ViTModel.from_pretrained('{tmp_path}'); prune(model, " in str(refused.value)
        assert "calibration=[{'pixel_values': ...}, ...])" in str(refused.value)

    @pytest.mark.parametrize(
        ("family", "auto", "message"),
        [
            ("bert", AutoModel, "unsupported architecture: BertModel generates no text; .* on batches, from Python"),
            (
                "bert",
                AutoModelForMaskedLM,
                "unsupported architecture: BertForMaskedLM generates no text; .* on batches",
            ),
            ("llama", AutoModel, "missing from .*: LlamaModel generates no text; prune it on batches, from"),
        ],
    )
    def test_a_class_without_the_head_of_one_that_does(self, family, auto, message, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        folder = save(tmp_path / family, AutoConfig.for_model(family, **sizes), auto.from_config)
        with pytest.raises(InputError, match=message):
            streamed(folder)


SIZES = dict(vocab_size=258, hidden_size=32, intermediate_size=48, num_attention_heads=4)
TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
# Other lists of modules are inside of the blocks, or in a tower that text does not run through.
BLOCKS = {
    "longcat_flash": (
        dict(ffn_hidden_size=48, expert_ffn_hidden_size=24, num_layers=3, q_lora_rank=16, kv_lora_rank=16, head_dim=8)
        | dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, zero_expert_num=1, moe_topk=2),
        [f"model.layers.{i}" for i in range(3)],
    ),
    "git": (
        dict(num_hidden_layers=1, vision_config=SIZES | dict(num_hidden_layers=2, image_size=16, patch_size=8)),
        ["git.encoder.layer.0"],
    ),
    "xlm": (dict(emb_dim=32, n_layers=1, n_heads=2), ["transformer.attentions.0", "transformer.ffns.0"]),
}


class TestBlocks:
    @pytest.mark.parametrize("family", first_is_fast(BLOCKS))
    def test_are_what_the_forward_calls_one_after_the_other(self, family, tmp_path):
        sizes, names = BLOCKS[family]
        with streamed(save(tmp_path, AutoConfig.for_model(family, **SIZES | TOKENS | sizes))) as model:
            assert model.names == names
            assert not model.unused

    def test_no_limit_of_tokens(self):
        assert max_seqlen(XLNetConfig()) is None
        assert max_seqlen(LlamaConfig()) == 2048


class TestErrors:
    """Whatever comes out of a model's own code is one line, with the exception as its cause."""

    @pytest.mark.parametrize(
        ("error", "passes"),
        first_is_fast(
            [
                *((KeyError("sound"), False), (StopIteration(), False), (InputError("own"), True)),
                *((IndexError("list\nindex"), False), (NameError("x"), False), (MemoryError(), True)),
                (torch.OutOfMemoryError("full"), True),
            ],
            3,
        ),
    )
    def test_of_a_block(self, error, passes, tmp_path, monkeypatch):
        def fails(*args, **kwargs):
            raise error

        folder = save_model(tmp_path, "llama")
        with streamed(folder) as model:
            states = embed(model, IDS, 2)
            model.open(1)
            monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fails)
            with pytest.raises(type(error) if passes else InputError) as caught:
                states.output(1, 0)
        if passes:
            assert caught.value is error
            return
        assert caught.value.__cause__ is error
        assert str(caught.value).startswith("unsupported model LlamaForCausalLM: model.layers.1 ")
        assert "\n" not in str(caught.value)
        assert type(error).__name__ in str(caught.value)
        with pytest.raises(InputError, match=r"model\.layers\.0 "):
            shape_of(inspect(folder))
