"""`prune` from Python: the same bytes as the command line, texts and tokens in place of names, models in memory."""

import logging
import subprocess
import sys
from functools import partial

import huggingface_hub.utils as hub
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.checkpoints import refused
from helpers.commands import TEXT, run, shards
from helpers.families import TOKENS, change_config, save_model
from helpers.texts import calibration_windows
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparsefw import InputError, PruneConfig, prune, verify
from sparsefw.driver import run as driver_run

SMALL = dict(nsamples=6, seqlen=32)
CONFIG = PruneConfig(kernel="torch", method="wanda")


PARTS = [TEXT[at : at + 400] for at in range(0, len(TEXT), 400)]
RECORDS = Dataset.from_list([{"text": part, "number": n} for n, part in enumerate(PARTS)])
MESSAGES = [{"messages": [{"role": "user", "content": part}]} for part in PARTS]
TEXTS = {
    "generator": iter(PARTS), "records": [{"text": part} for part in PARTS], "messages": MESSAGES, "Dataset": RECORDS,
    "IterableDataset": RECORDS.to_iterable_dataset(), "columns": RECORDS[:], "column": RECORDS["text"],
    "DataLoader": DataLoader(MESSAGES, batch_size=3), "DataLoader of texts": DataLoader(PARTS, batch_size=3),
}  # fmt: skip
ROWS = [list(range(n, n + 16)) for n in range(2, 8)]
PADDED = {"input_ids": [[2, 3, 4, 0], [5, 6, 7, 8]], "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]}


@pytest.fixture
def windows(source, out, monkeypatch):
    """The calibration windows of `prune`, whose run ends when they are there: their name, digest and shape."""
    monkeypatch.setattr(driver_run, "carry_out", lambda run, *others: run.calibration)

    def windows_of(**given):
        found = prune(source, out, CONFIG, **given).report
        return found.source, found.hash, found.ids.shape

    return windows_of


def test_documents_and_tokens(source, text, windows):
    """They make the same windows."""
    ids = calibration_windows(AutoTokenizer.from_pretrained(source), str(text), **SMALL, seed=0).ids
    assert windows(dataset=ids)[1:] == windows(dataset=text, **SMALL)[1:] == windows(dataset=[TEXT], **SMALL)[1:]


def test_kinds_of_texts(source, windows):
    """The same texts in whatever holds them are the same windows."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages[0].content }}"
    plain = windows(dataset=PARTS, tokenizer=tokenizer, **SMALL)
    for kind, texts in TEXTS.items():
        assert windows(dataset=texts, tokenizer=tokenizer, **SMALL) == plain, kind


@pytest.mark.parametrize(
    ("dataset", "shape", "expected"),
    [
        (Dataset.from_list([{"input_ids": row} for row in ROWS]).with_format("torch"), {}, ROWS),
        (DataLoader([{"input_ids": row} for row in ROWS], batch_size=4), {}, ROWS),
        (torch.tensor(ROWS).numpy(), {}, ROWS),
        (iter(ROWS), dict(nsamples=6, seqlen=16), ROWS),
        # Joined, and without padding.
        (PADDED, dict(nsamples=1, seqlen=7), [[2, 3, 4, 5, 6, 7, 8]]),
        ([[2, 3, 4], [5, 6]], dict(nsamples=1, seqlen=5), [[2, 3, 4, 5, 6]]),
    ],
)
def test_kinds_of_tokens(dataset, shape, expected, windows):
    assert windows(dataset=dataset, **shape) == windows(dataset=torch.tensor(expected))
    assert windows(dataset=iter(ROWS), nsamples=2)[2] == (2, 16)


def test_a_mixture_of_texts(text, windows):
    """By names and shares, as on the command line."""
    name, _, shape = windows(dataset={text: 1, "default": 2}, **SMALL)
    assert (name, shape) == (f"{text} (2) + default, training text (4)", (6, 32))


def test_what_a_config_asks_for_beside_logits(text, tmp_path):
    """As training has left it there. It changes no result, and is in the output as it was."""
    plain, asking = (save_model(tmp_path / name, "mixtral", num_hidden_layers=1) for name in ("plain", "asking"))
    change_config(asking, output_hidden_states=True, output_router_logits=True)
    options = dict(dataset=TOKENS, evaluate=text, eval_windows=4, kernel="torch", method="magnitude", reconstruct=1)
    results = [prune(source, tmp_path / f"of-{source.name}", **options) for source in (plain, asking)]
    assert results[0].perplexity == results[1].perplexity
    assert shards(results[0].output) == shards(results[1].output)
    assert (tmp_path / "of-asking" / "config.json").read_text() == (asking / "config.json").read_text()


def test_in_memory_without_an_output_or_a_tokenizer(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config._name_or_path = model.name_or_path = ""
    result = prune(model, config=CONFIG, dataset=TOKENS)
    assert result.output is result.report.arguments["output"] is None
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.5
    with refused("tokenizer: the model in memory was not loaded from a checkpoint"):
        prune(model, config=CONFIG, dataset=[TEXT], **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert prune(model, config=CONFIG, dataset=[TEXT], **SMALL, tokenizer=tokenizer).layers


class Kernelized(LlamaForCausalLM):
    """Has a kernel without gradients, as may a model that transformers 5.25 loads to a GPU."""

    def set_use_kernels(self, use_kernels, *_):
        for layer in self.model.layers:
            layer.mlp.act_fn.forward = lambda x: functional.silu(x).detach()
        self._use_kernels = True

    def reset_kernels(self):
        for layer in self.model.layers:
            del layer.mlp.act_fn.forward
        self._use_kernels = False


def test_kernels_of_the_hub_are_out_of_a_run(source):
    model, plain = (kind.from_pretrained(source) for kind in (Kernelized, LlamaForCausalLM))
    for each in (model, plain):
        prune(each, config=PruneConfig(kernel="torch", method="wanda", reconstruct=3), dataset=TOKENS)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert model.use_kernels
    assert all("forward" in vars(layer.mlp.act_fn) for layer in model.model.layers)


@pytest.mark.skipif(hasattr(LlamaForCausalLM, "reset_kernels"), reason="this transformers takes kernels out")
def test_kernels_that_stay_are_refused(source):
    model = LlamaForCausalLM.from_pretrained(source)
    model._use_kernels = True
    with refused("model: its kernels of the Hub .* load it without use_kernels"):
        prune(model, config=CONFIG, dataset=TOKENS)


def test_in_memory_without_a_head(source, out):
    """The output's names are those of its own class."""
    model = AutoModel.from_pretrained(source)
    with refused("evaluate: LlamaModel predicts no next tokens"):
        prune(model, config=CONFIG, dataset=TOKENS, evaluate=[TEXT])
    prune(model, out, CONFIG, dataset=TOKENS)
    assert verify.main([str(out)]) == 0


def test_a_folder_of_the_user(source, text, tmp_path, monkeypatch, capsys):
    """No shell puts its name in the place of `~` in Python, nor in `--output=~/pruned`."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = dict(dataset="~/text.txt", **SMALL, kernel="torch", method="magnitude")
    assert prune("~/model", "~/a", **options).output == tmp_path / "a"
    assert run("~/model", "~/text.txt", "~/b", "--method", "magnitude") == 0
    assert f"checkpoint: {tmp_path / 'b'}\n" in capsys.readouterr().out
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    assert not [*here.iterdir()]


REFUSED = {
    "a vector of tokens": dict(dataset=torch.zeros(4, dtype=torch.int64)),
    "more windows than rows": dict(dataset=torch.zeros(4, 8, dtype=torch.int64), nsamples=3),
    "tokens that are no integers": dict(dataset=[{"input_ids": [0.5]}]),
    "a list of names": dict(dataset=["c4", "wikitext"]),
    "nothing": dict(dataset=[]),
    "messages without a template": dict(dataset=[{"messages": []}]),
    "a text in place of its name": dict(dataset="a rose is a rose. " * 300),
    "an evaluation on records": dict(evaluate=[{"text": "a"}]),
    "rows longer than the model takes": dict(dataset=torch.ones(2, 65, dtype=torch.int64), nsamples=None, seqlen=None),
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_texts_that_are_refused_in_one_line(arguments, source, text, out):
    with pytest.raises(InputError):
        prune(source, out, **(dict(dataset=text, **SMALL, kernel="torch") | arguments))
    assert not out.exists()


def test_arguments_of_other_kinds_are_refused(source, out):
    prune_to_out = partial(prune, source, out)
    for name, hint in dict(stepps="steps", num_calibration_samples="nsamples", targets="include").items():
        with pytest.raises(TypeError, match=rf"'{name}'; did you mean {hint}\?$"):
            prune_to_out(dataset=TOKENS, **{name: 3})
    for name, other in dict(tokenizer="gpt2", config="2:4", dataset=5).items():
        with refused(f"{name}: "):
            prune_to_out(**{name: other})
    for other in (b"a", DatasetDict(train=RECORDS), [{"body": "a"}]):
        with refused("dataset: "):
            prune_to_out(dataset=other)
    with refused("output: "):
        prune(source)


def test_progress_and_log_go_where_the_caller_wants(source, tmp_path, caplog, capsys):
    """By default a bar, and the log by the logger."""
    caplog.set_level(logging.INFO, "sparsefw")
    hub.enable_progress_bars()
    records = []
    shows = partial(prune, source, config=CONFIG, dataset=TOKENS)
    result = shows(tmp_path / "bar")
    shown = capsys.readouterr()
    assert "1/1 [" in shown.err
    assert not shown.out
    assert any(r.message.startswith("sparsity: ") for r in caplog.records)
    shows(tmp_path / "called", progress=records.append, log=lambda line: None)
    assert [(r.done, r.total, r.block.name, len(r.layers)) for r in records] == [(1, 1, "model.layers.0", 7)]
    shows(tmp_path / "none", progress=False)
    hub.disable_progress_bars()
    shows(tmp_path / "off")
    hub.enable_progress_bars()
    assert not capsys.readouterr().err
    assert len(repr(result)) < 1000
    assert list(result.to_pandas()["name"]) == [layer.name for layer in result.layers]


IMPORT = """
import os, sys
before = dict(os.environ), list(sys.meta_path)
import sparsefw
dir(sparsefw)
assert not {"torch", "triton", "transformers"} & set(sys.modules)
assert (dict(os.environ), sys.meta_path) == before
"""


def test_importing_the_package_does_nothing():
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
