"""`prune(model, calibration=batches)`: any stack of blocks in memory, on batches of its own forward's arguments."""

import copy
import json
import re

import pytest
import torch
import transformers
from helpers.checkpoints import make_hub_cache, refused
from helpers.families import first_is_fast
from helpers.stacks import QUICK, STACKS, WANDA, check_pruned, drawn, random_ids, small, small_batches, weights_of
from huggingface_hub import ModelCard
from torch import nn
from torch.nn import functional as F

from sparsefw import prune
from sparsefw.data.batches import BATCHES, batches_of
from sparsefw.model.block_model import resident
from sparsefw.model.padding import unpadded_of

CPU = torch.device("cpu")


def unchanged(model, before):
    """Whether all weights are what they were."""
    return all(torch.equal(x, before[name]) for name, x in weights_of(model).items())


@pytest.mark.parametrize("name", first_is_fast(STACKS))
def test_pruned_in_place(name):
    model, batches = drawn(name)
    result = check_pruned(model, batches)
    assert result.output is None
    assert result.report.data.windows == len(batches)
    # The routers of a mixture stay dense.
    routers = [f"model.layers.{n}.mlp.gate.weight" for n in range(2) if name == "mixtral"]
    assert result.report.kept_dense == routers
    with resident(model, batches_of(batches, "calibration").batches[0], CPU) as opened:
        matrices = sum(x.dim() >= 2 for block in opened.blocks for x in block.parameters())
    assert len({layer.name.partition("[")[0] for layer in result.layers}) + len(routers) == matrices


def test_the_same_as_on_tokens():
    """A language model is pruned to the same weights on its tokens, and on batches with the same tokens."""
    model, _ = drawn("mixtral")
    torch.manual_seed(1)
    ids, other = random_ids(4, 12), copy.deepcopy(model)
    prune(model, dataset=ids, **WANDA)
    # Three windows of 12 tokens would be more than two micro-batches of two: a text's micro-batches hold 2048 tokens.
    prune(other, calibration=[{"input_ids": ids}], **WANDA)
    assert unchanged(model, weights_of(other))


class _Tokenizer:
    __call__ = dict

    def save_pretrained(self, folder):
        (folder / "tokenizer_config.json").write_text('{"a": 2}')


WRITTEN = {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "report.html", "report.json"}


@pytest.mark.parametrize("origin", ["folder", "given", "the Hub"])
def test_what_makes_inputs_comes_along(tmp_path, hub, monkeypatch, origin):
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
    output = prune(
        model, tmp_path / "out", calibration=batches, tokenizer=_Tokenizer() if given else None, **WANDA
    ).output
    tokenizer = {"tokenizer_config.json"} if given else {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert found == WRITTEN | pooling | tokenizer
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"a": 2 if given else 1}
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.get("base_model", "")) == ("mit", "org/name" * (origin == "the Hub"))
    assert 'prune(model, "out", calibration=batches, sparsity="0.5", method="wanda"' in card.text
    assert unchanged(type(model).from_pretrained(output), weights_of(model))


def test_the_model_and_its_config_are_as_they_were_but_for_its_layers(tmp_path):
    """What a run changes meanwhile is not written: without a cache, a model writes texts slowly."""
    model, batches = drawn("whisper")
    model.config.output_hidden_states, model.config.return_dict = True, False
    model.save_pretrained(tmp_path / "before")
    model.train()
    parameters, fast = dict(model.named_parameters()), torch.backends.mha.get_fastpath_enabled()
    needed = [x.requires_grad for x in parameters.values()]
    result = prune(model, tmp_path / "out", calibration=batches, **WANDA)
    assert {path.name for path in result.output.iterdir()} == WRITTEN | {"generation_config.json"}
    assert (result.output / "config.json").read_text() == (tmp_path / "before" / "config.json").read_text()
    assert model.config.use_cache
    assert model.config.output_hidden_states
    assert all(module.training for module in model.modules())
    assert all(x is parameters[name] for name, x in model.named_parameters())
    assert [x.requires_grad for x in parameters.values()] == needed
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any("forward" in vars(module) for module in model.modules())
    plain, _ = drawn("whisper")
    assert len(prune(plain, calibration=batches, **WANDA).layers) == len(result.layers) == 2 * 6 + 2 * 10
    assert unchanged(model, weights_of(plain))


def test_a_config_that_cannot_be_written(tmp_path):
    """Its library would refuse it when all blocks are pruned, and the model is changed."""
    model, batches = drawn("whisper")
    before, lines = weights_of(model), []
    model.generation_config.temperature = 0.5
    with refused(r"model: Whisper.* cannot be written: .*temperature"):
        prune(model, tmp_path / "out", calibration=batches, log=lines.append, **QUICK)
    assert not any("memory: " in line for line in lines)
    assert unchanged(model, before)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_goes_on_after_an_interruption(tmp_path, out):
    whole, batches = drawn("whisper")
    prune(whole, tmp_path / "whole", calibration=batches, **WANDA)
    model, _ = drawn("whisper")
    before, lines = weights_of(model), []

    def interrupt(line):
        if "decoder.layers.0.fc1" in line:
            raise KeyboardInterrupt

    # In a block, and where the pruned model is written.
    model.save_pretrained = lambda _: interrupt("decoder.layers.0.fc1")
    for log in interrupt, print:
        with pytest.raises(KeyboardInterrupt):
            prune(model, out, calibration=batches, log=log, **WANDA)
        assert unchanged(model, before)
    del model.save_pretrained
    with refused("calibration text"):
        prune(model, out, calibration=batches[::-1], **WANDA)
    model.config.dropout = 0.25
    with refused("the model was"):
        prune(model, out, calibration=batches, **WANDA)
    model.config.dropout = whole.config.dropout
    prune(model, out, calibration=batches, log=lines.append, **WANDA)
    assert "resuming an unfinished run: 4 of 4 shards are finished" in lines
    assert unchanged(model, weights_of(whole))


class TestPadding:
    """Texts of several lengths in a batch, and batches with and without padding."""

    RECONSTRUCTED = WANDA | {"reconstruct": 1}

    @pytest.mark.parametrize(("kind", "options"), [("bert", RECONSTRUCTED), ("t5", QUICK), ("torch", WANDA)])
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
        with refused(r"calibration\[1\]: .*layer\.0 is given attention_mask either for this"):
            prune(model, calibration=[batch((3, 5), 5), bare], **WANDA)

    @pytest.mark.parametrize(
        ("mask", "expected"),
        [
            (torch.tensor([[0, torch.finfo(torch.float16).min], [0, 0]])[:, None, None], [[True, False], [True, True]]),
            (torch.tensor([[1, 0], [1, 1]]), [[True, False], [True, True]]),
            # The last position is seen from itself alone.
            (torch.ones(2, 1, 2, 2).tril().bool(), None),
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


def test_a_block_that_runs_more_than_once_stays_dense():
    model = small(0, 1, 1, 2, 1, 3)
    result = check_pruned(model, small_batches(), compare=("wanda",))
    assert [layer.name for layer in result.report.layers_of("sparsefw")] == [
        f"blocks.{n}.{name}.weight" for n in (0, 2, 3) for name in ("fc1", "fc2")
    ]
    assert result.report.kept_dense == ["blocks.1.fc1.weight", "blocks.1.fc2.weight"]


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
    assert result.perplexity[BATCHES]["dense"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-3)


class TestRefusals:
    X = torch.randn(2, 8)

    @pytest.mark.parametrize(
        ("model", "data", "line"),
        [
            (nn.Linear(2, 2), [], "calibration: there is no batch"),
            (nn.Linear(2, 2), [X, X[:0]], r"calibration\[1\]: holds Tensor, and no tensor with entries"),
            (nn.Linear(2, 2), "c4", "calibration: got str, expected a list"),
            (nn.Linear(2, 2), [{"input_ids": [1, 2]}], r"calibration\[0\]: holds list, and no tensor with entries"),
            (nn.Linear(2, 2), [X, 7], r"calibration\[1\]: expected the arguments of the model's forward"),
            (nn.Linear(2, 2), [torch.tensor([torch.nan])], r"calibration\[0\]: holds NaN"),
            ("default", [X], r"got str, expected a module in memory, since .*AutoModel\.from_pretrained\('default'\)"),
            (nn.Linear(8, 8), [X], "Linear: its forward on these batches calls no modules of a ModuleList"),
            (small(0, 1, 0, 1), [X], r"blocks\.0 runs more than once in a forward"),
            (small().to("meta"), [X], r"blocks\.0\.fc1\.weight: is on the meta device"),
            (small().double(), [X.double()], r"blocks\.0\.fc1\.weight: has dtype float64; give a model in fp32"),
            (drawn("vit")[0], [{"pixel_values": torch.randn(2, 3, 9, 9)}], "fails on these batches"),
        ],
    )
    def test_models_and_batches(self, model, data, line, out):
        with refused(line):
            prune(model, out, calibration=data)

    def test_a_module_that_reads_no_text(self):
        with refused(r"got Linear, expected a folder, .* needs batches: calibration="):
            prune(nn.Linear(8, 8), dataset=torch.ones(2, 4, dtype=torch.int64))
        with pytest.raises(TypeError, match="calibration and 'dataset'"):
            prune(nn.Linear(8, 8), calibration=[self.X], dataset=3)

    def test_nothing_changes_if_it_fails(self):
        model, batches = drawn("vit")
        before = weights_of(model)
        lines, unlabelled = [], {"pixel_values": batches[1]["pixel_values"]}
        with refused(r"evaluate\[1\]: ViTForImageClassification returns no loss"):
            prune(model, calibration=batches, evaluate=[batches[0], unlabelled], log=lines.append, **QUICK)
        ignored = batches[1] | {"labels": torch.full_like(batches[1]["labels"], -100)}
        with refused(r"evaluate\[1\]: the loss of this batch is NaN; give labels that are not all ignored"):
            prune(model, calibration=batches, evaluate=[batches[0], ignored], log=lines.append, **QUICK)
        # At the end, what was pruned would be lost: with other batches it is another run.
        assert not any("q_proj" in line for line in lines)
        batches[2]["pixel_values"] = torch.full_like(batches[2]["pixel_values"], torch.inf)
        with refused("hold") as failed:
            prune(model, calibration=batches, **QUICK)
        # There is nothing that the same command would go on from.
        assert not getattr(failed.value, "__notes__", [])
        assert unchanged(model, before)
