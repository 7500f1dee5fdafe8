"""Blocks that run one at a time give the whole model's results, for every family."""

import json
import math

import pytest
import torch
from helpers.families import VOCABULARY, save_model
from helpers.verifying import change_tensor
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sparsefw.checkpoint.source import inspect
from sparsefw.data.windows import windows_of
from sparsefw.errors import InputError
from sparsefw.model import StreamedModel, embed, perplexity
from sparsefw.model.head import logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens(n=5, seqlen=24):
    return torch.randint(2, VOCABULARY, (n, seqlen), generator=torch.Generator().manual_seed(0))


def open_model(folder):
    return StreamedModel(inspect(folder), DEVICE)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run_through(model, ids, batch_size):
    states = embed(model, ids, batch_size)
    for i in range(len(model.blocks)):
        model.open(i)
        states.advance(i)
    return states


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError),
        (MemoryError(), MemoryError),
    ],
)
def test_memory_that_is_full_while_experts_are_stacked(error, raised, tmp_path, monkeypatch):
    """transformers catches every exception there, and goes on without the parameter."""

    def full(*args, **kwargs):
        raise error

    model = open_model(save_model(tmp_path, "qwen3_moe"))
    monkeypatch.setattr(torch, "stack", full)
    with pytest.raises(raised):
        model.open(0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_exported_tensors_are_the_checkpoints(family, tmp_path):
    folder = save_model(tmp_path, family, torch.bfloat16)
    source = inspect(folder)
    model = open_model(folder)
    exported = {name: t for piece in model.pieces for name, t in model.other_tensors(piece).items()}
    for i in range(len(model.blocks)):
        model.open(i)
        exported |= model.block_tensors(i)
        model.close(i)
    assert set(exported) == set(source.tensors)
    for name, info in source.tensors.items():
        with safe_open(folder / info.file, "pt") as shard:
            assert torch.equal(exported[name], shard.get_tensor(name))


def test_perplexity_is_that_of_all_windows(tmp_path):
    """The size of micro-batches does not matter; 5 windows make two and a half."""
    model, ids = open_model(save_model(tmp_path, "gemma2")), tokens(5)
    states = run_through(model, ids, batch_size=2)
    predictions = [logits(model, ids[n : n + 1], states.hidden[n // 2][n % 2 : n % 2 + 1])[0, :-1] for n in range(5)]
    losses = [F.cross_entropy(x, window[1:]).item() for x, window in zip(predictions, ids, strict=True)]
    assert perplexity(states, windows_of(ids, "")) == pytest.approx(math.exp(sum(losses) / 5), rel=1e-12)


class TestRefused:
    def test_nan_in_a_weight_is_named(self, tmp_path):
        folder = save_model(tmp_path / "a", "llama")
        whole = AutoModelForCausalLM.from_pretrained(folder)
        whole.model.layers[1].mlp.up_proj.weight.data[3, 5] = whole.model.norm.weight.data[3] = torch.nan
        whole.save_pretrained(tmp_path / "b")
        model = open_model(tmp_path / "b")
        model.open(0)
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
            model.open(1)
        with pytest.raises(InputError, match=r"model\.norm\.weight.*NaN"), model.outside_loaded():
            pass

    def test_overflowing_activations_are_named(self, tmp_path):
        folder = save_model(tmp_path / "a", "llama", torch.float16)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        whole.model.layers[1].mlp.down_proj.weight.data.fill_(60000)
        whole.save_pretrained(tmp_path / "b")
        model = open_model(tmp_path / "b")
        states = embed(model, tokens(), 5)
        for i in (0, 1):
            model.open(i)
        states.advance(0)
        with pytest.raises(InputError, match=r"activations after model\.layers\.1"):
            states.advance(1)

    def test_tokens_without_an_embedding(self, tmp_path):
        model = open_model(save_model(tmp_path, "llama"))
        with pytest.raises(InputError, match=f"token {VOCABULARY}: the model embeds {VOCABULARY} tokens"):
            embed(model, torch.tensor([[2, VOCABULARY]]), 1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"intermediate_size": 64}, r"mlp\.\w+_proj\.weight: the checkpoint has shape"),
            ({"num_hidden_layers": 4}, r"model\.layers\.3\..* missing from the checkpoint \(9 in all\)"),
            ({"model_type": "nonsense"}, "has no class for model_type nonsense"),
            ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "is never run"),
            ({"hidden_size": "many"}, "cannot load"),
            ({"hidden_size": -4}, "cannot load"),
        ],
    )
    def test_config_that_does_not_fit(self, tmp_path, changes, message):
        folder = save_model(tmp_path, "llama")
        (folder / "evil.py").write_text("raise SystemExit('executed')")
        change_config(folder, **changes)
        with pytest.raises(InputError, match=message) as caught:
            open_model(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
    def test_integers_in_place_of_weights(self, tmp_path, dtype):
        folder = save_model(tmp_path, "llama")
        name = "model.layers.1.mlp.up_proj.weight"
        change_tensor(folder, name, lambda W: (100 * W).to(dtype))
        with pytest.raises(
            InputError, match=rf"tensor {name} has dtype {dtype}, and the model has torch.float32 there"
        ):
            open_model(folder)


def test_tensors_that_the_model_does_not_use_are_named_and_written(tmp_path):
    folder = save_model(tmp_path, "llama")
    # In another dtype than the model, and with a value that no weight may have.
    name = "model.layers.2.input_layernorm.weight"
    change_tensor(folder, name, lambda x: x.to(torch.bfloat16).index_fill(0, torch.tensor([1]), -torch.inf))
    change_config(folder, num_hidden_layers=2)
    model = open_model(folder)
    (note,) = model.notes
    assert note.startswith("not pruned: 9 tensors that LlamaForCausalLM has no use for")
    assert note.endswith(f"{name} first")
    written = {name: tensor for piece in model.pieces for name, tensor in model.other_tensors(piece).items()}
    stored = {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    assert {n for n in stored if "layers.2." in n} < written.keys()
    assert all(torch.equal(x, stored[n]) and x.dtype == stored[n].dtype for n, x in written.items())
