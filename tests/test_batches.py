"""`prune(model, calibration=batches)`: any stack of blocks in memory, on batches of its own forward's arguments."""

import copy
import json
import re

import pytest
import torch
import transformers
from helpers.checkpoints import make_hub_cache
from helpers.families import first_is_fast
from helpers.stacks import STACKS, drawn, perplexity_of_whole, random_ids
from huggingface_hub import ModelCard
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional as F

from sparsefw import InputError, prune
from sparsefw.data.batches import batches_of
from sparsefw.model import resident
from sparsefw.model.padding import unpadded_of

NAME = "batches given in Python"
QUICK = dict(kernel="torch", steps=3, refit=2, rounds=0, reconstruct=0, sparsity="0.5")
WANDA = dict(kernel="torch", method="wanda", sparsity="0.5")
CPU = torch.device("cpu")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", first_is_fast(STACKS))
def test_pruned_in_place(name):
    model, batches = drawn(name)
    before, dense = weights(model), perplexity_of_whole(model, batches)
    result = prune(model, calibration=batches, evaluate=batches, **QUICK)
    # The report is of the model itself.
    assert result.perplexity[NAME]["dense"] == pytest.approx(dense, rel=1e-5)
    assert result.perplexity[NAME]["sparsefw"] == pytest.approx(perplexity_of_whole(model, batches), rel=1e-5)
    names = {layer.name.partition("[")[0] for layer in result.layers}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in names)
    for layer in result.layers:
        key, _, index = layer.name.partition("[")
        W = model.state_dict()[key]
        W = W[int(index.rstrip("]"))] if index else W
        assert ((W != 0).sum(1) <= W.shape[1] // 2).all()
    assert result.output is None
    assert result.report.data.windows == len(batches)
    with resident(model, batches_of(batches, "calibration").batches[0], CPU) as opened:
        matrices = sum(x.dim() >= 2 for block in opened.blocks for x in block.parameters())
    # The routers of a mixture stay dense.
    routers = [f"model.layers.{n}.mlp.gate.weight" for n in range(2) if name == "mixtral"]
    assert result.report.kept_dense == routers
    assert len(names) + len(routers) == matrices


def test_the_same_as_on_tokens():
    """A language model is pruned to the same weights on its tokens, and on batches with the same tokens."""
    model, _ = drawn("mixtral")
    torch.manual_seed(1)
    ids, other = random_ids(4, 12), copy.deepcopy(model)
    prune(model, dataset=ids, **WANDA)
    # Three windows of 12 tokens would be more than two micro-batches of two: a text's micro-batches hold 2048 tokens.
    prune(other, calibration=[{"input_ids": ids}], **WANDA)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class TestOutput:
    def test_a_model_of_transformers(self, tmp_path):
        model, batches = drawn("vit")
        lines = []
        result = prune(model, tmp_path / "out", calibration=batches, log=lines.append, **QUICK)
        assert "calibration: 3 batches of up to 34 positions" in lines
        assert any("; 1 batch at a time," in line for line in lines)
        assert "3 batches of up to 34 positions" in (tmp_path / "out" / "report.html").read_text()
        loaded = type(model).from_pretrained(tmp_path / "out")
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
        assert result.output == tmp_path / "out"
        assert {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "report.html", "report.json"} == {
            path.name for path in result.output.iterdir()
        }

    @pytest.mark.parametrize("origin", ["folder", "given", "the Hub"])
    def test_what_makes_inputs_comes_along(self, tmp_path, hub, monkeypatch, origin):
        """From the folder of the checkpoint that the model was loaded from, but for a tokenizer that is passed."""
        given = origin == "given"
        model, batches = drawn("bert")
        model.save_pretrained(tmp_path / "in")
        pooling = {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
        for name in (*pooling, "tokenizer.json", "tokenizer_config.json", "vocab.txt", "modeling.py"):
            (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_text('{"auto_map": {}, "a": 1}')
        (tmp_path / "in/README.md").write_text("---\nlicense: mit\n---\n# The source's\n")
        model = type(model).from_pretrained(tmp_path / "in")
        if origin == "the Hub":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            make_hub_cache(tmp_path / "in", hub)
            model.name_or_path = "org/name"
        prune(model, tmp_path / "out", calibration=batches, tokenizer=_Tokenizer() if given else None, **WANDA)
        read = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
        written = {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "report.html", "report.json"}
        tokenizer = {"tokenizer_config.json"} if given else {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
        assert read.keys() == written | pooling | tokenizer
        assert json.loads(read["tokenizer_config.json"].read_text()) == {"a": 2 if given else 1}
        assert json.loads(read["config.json"].read_text())["architectures"] == ["BertForMaskedLM"]
        card = ModelCard.load(read["README.md"])
        assert (card.data.license, card.data.get("base_model", "")) == ("mit", "org/name" * (origin == "the Hub"))
        assert 'SentenceTransformer("out")' in card.text
        assert 'prune(model, "out", calibration=batches, sparsity="0.5", method="wanda"' in card.text

    def test_nothing_that_makes_inputs(self, tmp_path):
        model, batches = drawn("bert")
        (note,) = prune(model, tmp_path / "out", calibration=batches, **WANDA).report.notes
        assert note.startswith("no tokenizer or processor is written")
        assert note.endswith("; give tokenizer=")

    def test_the_config_is_that_of_the_model(self, tmp_path):
        """What a run makes of it meanwhile is not written: without a cache, a model writes texts slowly."""
        model, batches = drawn("whisper")
        model.config.output_hidden_states, model.config.return_dict = True, False
        model.save_pretrained(tmp_path / "before")
        result = prune(model, tmp_path / "out", calibration=batches, **WANDA)
        assert model.config.use_cache
        assert model.config.output_hidden_states
        assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "before" / "config.json").read_text()
        plain, _ = drawn("whisper")
        assert len(prune(plain, calibration=batches, **WANDA).layers) == len(result.layers)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    def test_a_config_that_cannot_be_written(self, tmp_path):
        """Its library would refuse it when all blocks are pruned, and the model is changed."""
        model, batches = drawn("whisper")
        before = weights(model)
        model.generation_config.temperature = 0.5
        lines = []
        with pytest.raises(InputError, match=r"model: Whisper.* cannot be written: .*temperature"):
            prune(model, tmp_path / "out", calibration=batches, log=lines.append, **QUICK)
        assert not any("memory: " in line for line in lines)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert not [*tmp_path.iterdir()]

    def test_weights_in_one_buffer(self, tmp_path):
        """They stay there, as a training loop has laid them."""
        model, batches = drawn("diffusion")
        flat = torch.cat([*(x.detach().flatten() for x in model.parameters()), torch.zeros(8)])
        places = flat[:-8].split([x.numel() for x in model.parameters()])
        for x, place in zip(model.parameters(), places, strict=True):
            x.data = place.view(x.shape)
        prune(model, tmp_path / "out", calibration=batches, **QUICK)
        loaded, _ = drawn("diffusion")
        load_model(loaded, tmp_path / "out" / "model.safetensors")
        for x, place, saved in zip(model.parameters(), places, loaded.parameters(), strict=True):
            assert x.data_ptr() == place.data_ptr()
            assert torch.equal(x, saved)

    @pytest.mark.slow
    def test_goes_on_after_an_interruption(self, tmp_path):
        whole, batches = drawn("whisper")
        prune(whole, tmp_path / "whole", calibration=batches, **WANDA)
        model, _ = drawn("whisper")
        before = weights(model)
        with pytest.raises(KeyboardInterrupt):
            prune(model, tmp_path / "out", calibration=batches, log=_interrupt_at("decoder.layers.0.fc1"), **WANDA)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        lines = []
        with pytest.raises(InputError, match="calibration text"):
            prune(model, tmp_path / "out", calibration=batches[::-1], **WANDA)
        prune(model, tmp_path / "out", calibration=batches, log=lines.append, **WANDA)
        assert any(line.startswith("resuming an unfinished run: 2 of 4 shards") for line in lines)
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)


def _interrupt_at(layer):
    def log(line):
        if layer in line:
            raise KeyboardInterrupt

    return log


class _Tokenizer:
    __call__ = dict

    def save_pretrained(self, folder):
        (folder / "tokenizer_config.json").write_text('{"a": 2}')


class TestPadding:
    """Texts of several lengths in a batch, and batches with and without padding."""

    RECONSTRUCTED = WANDA | {"reconstruct": 1}

    @pytest.mark.parametrize(
        ("kind", "options"),
        [("bert", WANDA), ("bert", QUICK), ("bert", RECONSTRUCTED), ("t5", QUICK), ("torch", WANDA)],
    )
    def test_does_not_count(self, kind, options):
        """More padding changes nothing. Without it, the second batch has no padding."""
        results = []
        for more in (0, 5):
            model, batch = _encoder(kind)
            batches = [batch(lengths, max(lengths) + more) for lengths in ((3, 9, 4), (7, 7, 7), (5, 8, 8), (9, 2, 6))]
            results.append(prune(model, calibration=batches, **options).report)
        for few, more in zip(*(report.layers for report in results), strict=True):
            # torch's attention gives one layer all tokens in one row, in which padding counts.
            if kind != "torch" or not re.search("out_proj|layers.1", few.name):
                assert few.error == pytest.approx(more.error, rel=1e-2)
        for few, more in zip(*(report.blocks for report in results), strict=True):
            if options is self.RECONSTRUCTED:
                assert few.reconstruction.before == pytest.approx(more.reconstruction.before, rel=1e-2)
        counted = any(note.startswith("75 of 159 positions count") for note in results[1].notes)
        assert counted == (kind != "torch")

    def test_a_batch_without_a_mask(self):
        model, batch = _encoder("bert")
        bare = {"input_ids": random_ids(2, 5)}
        with pytest.raises(InputError, match=r"calibration\[1\]: .*layer\.0 is given attention_mask either for this"):
            prune(model, calibration=[batch((3, 5), 5), bare], **WANDA)

    @pytest.mark.parametrize(
        ("mask", "expected"),
        [
            (torch.tensor([[True, False]]).expand(2, 1, 2, 2), [[True, False]] * 2),
            (torch.tensor([[0, torch.finfo(torch.float16).min], [0, 0]])[:, None, None], [[True, False], [True, True]]),
            (torch.tensor([[1, 0], [1, 1]]), [[True, False], [True, True]]),
            # The last position is seen from itself alone.
            (torch.ones(2, 1, 2, 2).tril().bool(), None),
            (torch.zeros(2, 1, 1, 2), None),
            (torch.zeros(2, 2, dtype=torch.bool), None),
        ],
    )
    def test_masks(self, mask, expected):
        found = unpadded_of([mask])
        assert (found if found is None else found.tolist()) == expected


def _encoder(kind):
    """A model that reads padded sentences, and a function of their lengths and the padded length that makes a batch."""
    torch.manual_seed(0)
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    elif kind == "t5":
        sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=99)
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    else:
        model, _ = drawn("bert")

    def batch(lengths, length):
        ids = torch.zeros(len(lengths), length, dtype=torch.int64)
        for row, n in zip(ids, lengths, strict=True):
            row[:n] = torch.arange(n * 7, n * 8) % 90 + 3
        if kind == "torch":
            return {"src": torch.sin(ids[..., None] * torch.arange(1.0, 17)), "src_key_padding_mask": ids == 0}
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    return model.eval(), batch


class TestManners:
    def test_the_model_is_as_it_was_but_for_its_layers(self):
        model, batches = drawn("whisper")
        model.train()
        parameters, fast = list(model.parameters()), torch.backends.mha.get_fastpath_enabled()
        needed = [parameter.requires_grad for parameter in parameters]
        result = prune(model, calibration=batches, **WANDA)
        assert all(module.training for module in model.modules())
        assert model.config.use_cache
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert [parameter.requires_grad for parameter in model.parameters()] == needed
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert not any("forward" in vars(module) for module in model.modules())
        assert len(result.layers) == 2 * 6 + 2 * 10

    def test_buffers_that_blocks_write_to(self):
        """Whether in place or not, they are as they were."""

        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
                self.register_buffer("calls", torch.zeros(()))
                self.register_buffer("tokens", torch.zeros(()))

            def forward(self, x):
                self.calls += 1
                self.tokens = self.tokens + x.shape[0]
                return x + self.down(self.up(x).relu())

        torch.manual_seed(0)
        model, batches = nn.Sequential(Counting(), Counting()), [torch.randn(4, 8)] * 3
        prune(model, calibration=batches, **QUICK)
        assert not any(buffer.any() for buffer in model.buffers())

    def test_nothing_changes_if_it_fails(self):
        model, batches = drawn("vit")
        before = weights(model)
        batches[2]["pixel_values"] = torch.full_like(batches[2]["pixel_values"], torch.inf)
        with pytest.raises(InputError, match="hold") as failed:
            prune(model, calibration=batches, **QUICK)
        # There is nothing that the same command would go on from.
        assert not getattr(failed.value, "__notes__", [])
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


class _Loop(nn.Module):
    """Runs the second of its blocks three times."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x, target=None):
        for n in (0, 1, 1, 2, 1, 3):
            x = x + self.blocks[n](x)
        return {"x": x} if target is None else {"loss": (x - target).square().mean()}


def test_a_block_that_runs_more_than_once_stays_dense():
    torch.manual_seed(0)
    model, batches = _Loop().eval(), [{"x": torch.randn(4, 8), "target": torch.randn(4, 8)} for _ in range(3)]
    result = prune(model, calibration=batches, evaluate=batches, compare=("wanda",), **QUICK)
    assert [layer.name for layer in result.report.layers_of("sparsefw")] == [
        f"blocks.{n}.{i}.weight" for n in (0, 2, 3) for i in (0, 2)
    ]
    assert result.report.kept_dense == ["blocks.1.0.weight", "blocks.1.2.weight"]
    assert result.report.notes == ["stay dense: 1 blocks that run more than once in a forward, blocks.1 first"]
    assert result.perplexity[NAME]["sparsefw"] == pytest.approx(perplexity_of_whole(model, batches), rel=1e-5)


def test_losses_are_in_fp32():
    """In bf16 a loss near 5.7 is right to 0.03."""
    model, batches = drawn("bert")
    model = model.bfloat16()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(**batch)["logits"].float().flatten(0, 1), batch["labels"].flatten())
            for batch in batches
        ]
    result = prune(model, calibration=batches, evaluate=batches, **QUICK)
    assert result.perplexity[NAME]["dense"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-3)


class _Twice(nn.Module):
    """Runs its blocks twice."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class TestRefusals:
    @pytest.mark.parametrize(
        ("calibration", "line"),
        [
            ([], "calibration: there is no batch"),
            ([torch.ones(2, 2), torch.ones(0, 2)], r"calibration\[1\]: holds Tensor, and no tensor with entries"),
            (
                "c4",
                "calibration: got str, expected a list, .*; texts and tokens go into dataset",
            ),
            ([{"input_ids": [1, 2]}], r"calibration\[0\]: holds list, and no tensor with entries; a DataLoader makes"),
            ([torch.ones(2, 2), 7], r"calibration\[1\]: expected the arguments of the model's forward"),
            ([torch.tensor([torch.nan])], r"calibration\[0\]: holds NaN"),
        ],
    )
    def test_batches(self, calibration, line):
        with pytest.raises(InputError, match=line):
            prune(nn.Linear(2, 2), calibration=calibration)

    def test_models(self):
        x = torch.randn(2, 8)
        with pytest.raises(
            InputError, match=r"got str, expected a module in memory, since .*AutoModel\.from_pretrained\('default'\)"
        ):
            prune("default", "out", calibration=[x])
        with pytest.raises(InputError, match=r"Linear: its forward on these batches calls no modules of a ModuleList"):
            prune(nn.Linear(8, 8), calibration=[x])
        with pytest.raises(InputError, match=r"blocks\.0 runs more than once in a forward"):
            prune(_Twice(), calibration=[x])
        with pytest.raises(
            InputError, match=r"got Linear, expected a folder, .*; any other module needs batches: calibration="
        ):
            prune(nn.Linear(8, 8), dataset=torch.ones(2, 4, dtype=torch.int64))
        with pytest.raises(InputError, match=r"blocks\.0\.0\.weight: is on the meta device"):
            prune(_Twice().to("meta"), calibration=[x])

    @pytest.mark.parametrize("steps", [(1, 8), (16, 2)])
    def test_weights_with_gaps_and_buffers_that_share_memory(self, steps):
        model = _Loop()
        layer = model.blocks[0][0]
        layer.weight = nn.Parameter(torch.randn(128).as_strided(layer.weight.shape, steps))
        layer.register_buffer("scale", torch.ones(1).expand(8))
        prune(model, calibration=[torch.randn(16, 8)], **QUICK)
        assert (layer.weight == 0).any()

    def test_a_forward_that_fails(self):
        model, batches = drawn("vit")
        with pytest.raises(InputError, match=r"fails on these batches: .*check that the model itself runs on them"):
            prune(model, calibration=[{"pixel_values": torch.randn(2, 3, 9, 9)}], **QUICK)
        lines = []
        unlabelled = {"pixel_values": torch.randn(2, 3, 16, 16)}
        with pytest.raises(InputError, match=r"evaluate\[1\]: ViTForImageClassification returns no loss"):
            prune(model, calibration=batches, evaluate=[batches[0], unlabelled], log=lines.append, **QUICK)
        # At the end, what was pruned would be lost: with other batches it is another run.
        assert not any("q_proj" in line for line in lines)

    @pytest.mark.parametrize("argument", ["dataset", "seed"])
    def test_arguments_of_a_text(self, argument):
        with pytest.raises(TypeError, match=f"calibration and '{argument}', which is for texts only"):
            prune(nn.Linear(2, 2), calibration=[torch.ones(1)], **{argument: 3})
