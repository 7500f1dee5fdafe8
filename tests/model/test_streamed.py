"""Blocks run one at a time give what the whole model gives, for every family."""

import json

import pytest
import torch
from helpers.families import FAMILIES, VOCABULARY, save_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, XLMConfig, XLMWithLMHeadModel

from sparsefw import checkpoint
from sparsefw.errors import InputError
from sparsefw.model.streamed import StreamedModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens(n=5, seqlen=24):
    return torch.randint(2, VOCABULARY, (n, seqlen), generator=torch.Generator().manual_seed(0))


def open_model(folder):
    return StreamedModel(checkpoint.inspect(folder), DEVICE)


def stream_through(model, ids, batch_size):
    stream = model.start(ids, batch_size)
    for i in range(len(model.blocks)):
        model.open(i)
        model.advance(i, stream)
    return stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_whole_models(family, dtype, tmp_path):
    folder = save_model(tmp_path, family, dtype)
    model, ids = open_model(folder), tokens()
    stream = stream_through(model, ids, batch_size=2)
    # The same implementations of attention and experts: others sum in another order.
    same = {"attn_implementation": model.model.config._attn_implementation, "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **same).to(DEVICE).eval()
    for hidden, batch in zip(stream.hidden, ids.split(2), strict=True):
        with torch.no_grad():
            expected = whole(batch.to(DEVICE), use_cache=False).logits
        assert expected.std() > 0.1
        assert torch.equal(model.logits(batch, hidden), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_tensors_are_the_checkpoints(family, tmp_path):
    folder = save_model(tmp_path, family, torch.bfloat16)
    source = checkpoint.inspect(folder)
    model = open_model(folder)
    exported = model.other_tensors()
    for i in range(len(model.blocks)):
        model.open(i)
        exported |= model.block_tensors(i)
        model.close(i)
    assert set(exported) == set(source.tensors)
    for name, info in source.tensors.items():
        with safe_open(folder / info.file, "pt") as shard:
            assert torch.equal(exported[name], shard.get_tensor(name))


def test_loss_is_the_models_own(tmp_path):
    folder = save_model(tmp_path, "gemma2")
    model, ids = open_model(folder), tokens(2)
    stream = stream_through(model, ids, batch_size=2)
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").to(DEVICE).eval()
    with torch.no_grad():
        expected = whole(ids.to(DEVICE), labels=ids.to(DEVICE)).loss.item()
    assert model.loss(ids, stream.hidden[0]) == pytest.approx(expected, rel=1e-6)


def test_forked_streams_run_apart(tmp_path):
    model = open_model(save_model(tmp_path, "llama"))
    one = model.start(tokens(), 5)
    two = one.fork()
    model.open(0)
    model.advance(0, one)
    assert not torch.equal(one.hidden[0], two.hidden[0])
    model.advance(0, two)
    assert torch.equal(one.hidden[0], two.hidden[0])


def test_closing_a_block_frees_it(tmp_path):
    model = open_model(save_model(tmp_path, "llama"))
    model.open(0)
    assert not any(p.is_meta for p in model.blocks[0].parameters())
    model.close(0)
    assert all(p.is_meta for p in model.blocks[0].parameters())


class TestRefused:
    def test_nan_in_a_weight_is_named(self, tmp_path):
        folder = save_model(tmp_path / "a", "llama")
        whole = AutoModelForCausalLM.from_pretrained(folder)
        whole.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
        whole.save_pretrained(tmp_path / "b")
        model = open_model(tmp_path / "b")
        model.open(0)
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
            model.open(1)

    def test_inf_in_the_embedding_is_named(self, tmp_path):
        folder = save_model(tmp_path / "a", "llama")
        whole = AutoModelForCausalLM.from_pretrained(folder)
        whole.model.embed_tokens.weight.data[0, 0] = torch.inf
        whole.save_pretrained(tmp_path / "b")
        with pytest.raises(InputError, match=r"model\.embed_tokens\.weight"):
            open_model(tmp_path / "b").start(tokens(), 5)

    def test_overflowing_activations_are_named(self, tmp_path):
        folder = save_model(tmp_path / "a", "llama", torch.float16)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        whole.model.layers[1].mlp.down_proj.weight.data.fill_(60000)
        whole.save_pretrained(tmp_path / "b")
        model = open_model(tmp_path / "b")
        stream = model.start(tokens(), 5)
        for i in (0, 1):
            model.open(i)
        model.advance(0, stream)
        with pytest.raises(InputError, match=r"activations after model\.layers\.1"):
            model.advance(1, stream)

    def test_tokens_without_an_embedding(self, tmp_path):
        model = open_model(save_model(tmp_path, "llama"))
        with pytest.raises(InputError, match=f"token {VOCABULARY}, but the model embeds {VOCABULARY}"):
            model.start(torch.tensor([[2, VOCABULARY]]), 1)

    def change_config(self, folder, **changes):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_wrong_shape(self, tmp_path):
        folder = save_model(tmp_path, "llama")
        self.change_config(folder, intermediate_size=64)
        with pytest.raises(InputError, match=r"mlp\.\w+_proj\.weight: the checkpoint has shape"):
            open_model(folder)

    def test_missing_tensor(self, tmp_path):
        folder = save_model(tmp_path, "llama")
        self.change_config(folder, num_hidden_layers=4)
        with pytest.raises(InputError, match=r"model\.layers\.3\..* missing from the checkpoint \(9 in all\)"):
            open_model(folder)

    def test_tensors_that_the_model_does_not_use_are_named(self, tmp_path):
        folder = save_model(tmp_path, "llama")
        self.change_config(folder, num_hidden_layers=2)
        assert any("model.layers.2.mlp.up_proj.weight" in note for note in open_model(folder).notes)

    @pytest.mark.parametrize("changes", [{"model_type": "nonsense"}, {"hidden_size": "many"}, {"hidden_size": -4}])
    def test_config_that_transformers_cannot_use(self, tmp_path, changes):
        folder = save_model(tmp_path, "llama")
        self.change_config(folder, **changes)
        with pytest.raises(InputError, match="cannot load") as caught:
            open_model(folder)
        assert "\n" not in str(caught.value)

    def test_code_in_the_checkpoint_is_not_run(self, tmp_path):
        folder = save_model(tmp_path, "llama")
        (folder / "evil.py").write_text("raise SystemExit('executed')")
        self.change_config(
            folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        )
        with pytest.raises(InputError):
            open_model(folder)

    def test_model_without_one_list_of_blocks(self, tmp_path):
        XLMWithLMHeadModel(XLMConfig(vocab_size=16, emb_dim=8, n_layers=2, n_heads=2)).save_pretrained(tmp_path)
        with pytest.raises(
            InputError, match=r"unsupported model XLMWithLMHeadModel: one list of 2 decoder blocks .* 4 of"
        ):
            open_model(tmp_path)
