"""Runs with a reconstruction: its rounds, and blocks that are put back."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.commands import make_place, tensors_of
from helpers.families import first_is_fast
from helpers.reconstructed import METHODS, RATE, WINDOWS, run
from transformers import AutoModelForCausalLM

from sparsefw.driver import reconstruct, texts
from sparsefw.driver.reconstruct import BlockFit
from sparsefw.model.activations import split_batches

pytestmark = pytest.mark.usefixtures("constants")


@pytest.mark.parametrize(
    ("way", "rate"),
    first_is_fast([("wanda", 1e30), ("dense targets", 1e3)]),
)
def test_a_block_that_gets_worse_is_put_back(way, rate, llama, out, monkeypatch):
    """Then its weights are what they were, bit for bit, even if they had gone beyond all numbers."""
    evaluation = ["--eval", str(llama / "text.txt"), "--eval-windows", "2"]
    monkeypatch.setattr(reconstruct, "RATE", rate)
    report, seen = run(llama, out, *METHODS[way], *evaluation, "--reconstruct", "1")
    assert all(block.reconstruction.put_back for block in report.blocks)
    # Loads, whatever the losses are.
    assert all(math.isnan(x.after) or x.after >= x.before for x in (b.reconstruction for b in report.blocks))
    written = tensors_of(out)
    for i, block in enumerate(report.blocks):
        assert seen.weights[i]
        for name, before in seen.weights[i].items():
            assert torch.equal(written[f"{block.name}.{name}"], before)
    # Nothing of what was put back runs on through the model.
    assert all(math.isfinite(x) for x in report.evaluation[0].perplexity.values())


@pytest.mark.parametrize(
    ("way", "family"),
    # Experts are watched while the block runs, and outputs are compared.
    first_is_fast([("wanda", "llama"), ("dense targets", "qwen3_moe")]),
)
def test_nothing_is_fitted_to_what_is_held_out(way, family, tmp_path, monkeypatch):
    """Layers are those of a run on the other windows alone, up to the first block that is reconstructed."""
    folder = make_place(tmp_path, family, num_hidden_layers=2)
    report, seen = run(folder, tmp_path / "out", *METHODS[way], "--reconstruct", "1")
    drawn = texts.WindowStream.take
    learned, _ = split_batches(WINDOWS)

    def fewer(stream, n):
        windows = drawn(replace(stream, nsamples=WINDOWS), WINDOWS)
        return replace(windows, ids=windows.ids[learned])

    monkeypatch.setattr(texts.WindowStream, "take", fewer)
    alone, _ = run(folder, tmp_path / "alone", *METHODS[way], "--nsamples", str(len(learned)))
    loaded, (first, *_) = AutoModelForCausalLM.from_pretrained(tmp_path / "alone"), report.blocks
    written = dict(loaded.named_parameters())
    for name, before in seen.weights[0].items():
        assert torch.equal(written[f"{first.name}.{name}"], before)
    errors = [[layer.error for layer in one.layers if ".layers.0." in layer.name] for one in (report, alone)]
    assert errors[0] == errors[1]


FIRST_BLOCK = ["--method", "wanda", "--include", "layers.0", "--reconstruct", "1"]
STEPS = len(split_batches(WINDOWS)[0])


@pytest.mark.parametrize(
    ("found", "steps", "after", "put_back"),
    [
        # Others follow as long as one pays, up to four.
        ([0.9, 0.8, 0.79], 3, 0.79, False),
        pytest.param([0.9, 0.8, 0.7, 0.6], 4, 0.6, False, marks=pytest.mark.slow),
        # A last one that has lost is put back, those before it stay.
        ([0.9, 0.95], 2, 0.9, False),
        ([math.nan], 1, math.nan, True),
    ],
)
def test_rounds_follow_each_other_as_long_as_they_pay(found, steps, after, put_back, llama, out, monkeypatch):
    losses = iter(found)
    monkeypatch.setattr(reconstruct, "MAX_ROUNDS", 4)
    monkeypatch.setattr(BlockFit, "loss", lambda self: 1.0)
    monkeypatch.setattr(BlockFit, "round", lambda self, *given: next(losses))
    report, _ = run(llama, out, *FIRST_BLOCK)
    record = report.blocks[0].reconstruction
    assert next(losses, None) is None
    assert record.steps == steps * STEPS
    assert record.put_back is put_back
    assert record.after == pytest.approx(after, nan_ok=True)


@pytest.mark.parametrize(("rate", "gains"), first_is_fast([(1e3, False), (RATE, True)]), ids=["loses", "gains"])
def test_a_second_round_begins_where_the_first_ended(rate, gains, llama, out, monkeypatch):
    losses, weights, measure = [], [], BlockFit.loss

    def watched(fit):
        losses.append(measure(fit))
        block = fit.run.model.blocks[fit.number]
        weights.append({f"model.layers.0.{name}": x.detach().cpu().clone() for name, x in block.named_parameters()})
        # Rounds after the first have this rate.
        monkeypatch.setattr(reconstruct, "RATE", rate if len(losses) > 1 else RATE)
        return losses[-1]

    monkeypatch.setattr(BlockFit, "loss", watched)
    monkeypatch.setattr(reconstruct, "MAX_ROUNDS", 2)
    monkeypatch.setattr(reconstruct, "WORTH", 0.0)
    report, _ = run(llama, out, *FIRST_BLOCK)
    before, first, second = losses
    assert first < before
    assert (second < first) is gains
    found = report.blocks[0].reconstruction
    assert (found.before, found.after) == (before, min(first, second))
    assert found.steps == 2 * STEPS
    assert not found.put_back
    written = tensors_of(out)
    for layer in report.layers:
        of_round = [behind[layer.name] for behind in weights]
        assert torch.equal(written[layer.name], of_round[2 if gains else 1])
        assert all((a != b).sum() > 0.9 * (a != 0).sum() for a, b in itertools.pairwise(of_round))
