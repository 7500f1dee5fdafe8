"""The command line from end to end on tiny models: what it writes, prints and refuses."""

import pytest
import torch
from helpers.commands import TEXT, report_of, run, shards, tensors_of
from helpers.families import FAMILIES, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefw.report import log
from sparsefw.report.content import read_report


def perplexities(report):
    return report["evaluation"][0]["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "refit"), [*((family, "4") for family in FAMILIES), ("llama", "0")])
def test_every_family_end_to_end(family, refit, tmp_path, out, text):
    """The perplexity that is measured while streaming is that of the written checkpoint."""
    source = save_model(tmp_path / "model", family, torch.bfloat16)
    evaluation = ["--eval", str(text), "--eval-windows", "3"]
    assert run(source, text, out, "--sparsity", "2:4", "--refit", refit, *evaluation) == 0
    before, after = tensors_of(source), tensors_of(out)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    report = report_of(out)
    assert len(report["layers"]) >= 3 * 4
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    for name in changed:
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept]) == (refit == "0")
        assert (kept.view(-1, 4).sum(1) <= 2).all()
    # Perplexity of the checkpoint that was written, by transformers alone.
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", attn_implementation="eager" if "gemma" in family else None
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][: 3 * 32]).view(3, 32)
    with torch.no_grad():
        loss = torch.stack([model(row[None], labels=row[None]).loss for row in ids]).mean()
    assert perplexities(report)["sparsefw"] == pytest.approx(loss.exp().item(), rel=2e-2)


@pytest.mark.slow
def test_compare_prunes_each_method_as_if_alone(tmp_path, text):
    source = save_model(tmp_path / "model", "llama", torch.bfloat16)
    evaluation, found = ["--eval", str(text), "--eval-windows", "4"], {}
    for name, flags in {"both": ["--compare", "wanda"], "wanda": ["--method", "wanda"], "sparsefw": []}.items():
        assert run(source, text, tmp_path / name, *flags, *evaluation) == 0
        found[name] = perplexities(report_of(tmp_path / name))
    assert found["both"] == found["wanda"] | found["sparsefw"]
    assert shards(tmp_path / "both") == shards(tmp_path / "sparsefw")


def test_long_windows_are_cut(source, out, text, capsys):
    assert run(source, text, out, "--seqlen", "1000", "--method", "magnitude") == 0
    assert "seqlen: 64 tokens, the model's maximum (asked for 1000)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--alpha", "1.5"], "--alpha 1.5"),
        (["--ignore", "no_such_layer"], "--ignore no_such_layer"),
        (["--nsamples", "100000"], "--nsamples"),
        (["--eval", "./missing.txt"], "missing.txt"),
        (["--model", "./nowhere"], "nowhere"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing_behind(flags, named, source, tmp_path, text, capsys):
    assert run(source, text, tmp_path / "out", *flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sparsefw: ")
    assert named in line
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def test_a_source_that_is_sparse_already(tmp_path, text, capsys):
    """It is not called dense, and where the warm start loses nothing no error is relative to it."""
    source = save_model(tmp_path / "model", "llama", torch.float32)
    flags = ["--method", "sparsegpt", "--compare", "frank-wolfe", "--eval", str(text), "--eval-windows", "1"]
    said = "the source is sparse already: 60 % zeros in the layers to prune of its first block"
    for name, first in (("once", "dense"), ("twice", "source")):
        assert run(source, text, tmp_path / name, *flags) == 0
        source, out = tmp_path / name, capsys.readouterr().out
        assert (f"note: {said}\n" in out) == (name == "twice")
        rows = dict(log.result_rows(read_report(source / "report.json")))
        assert [*rows] == [first, "frank-wolfe", "sparsegpt"]
    assert said in (source / "README.md").read_text()
