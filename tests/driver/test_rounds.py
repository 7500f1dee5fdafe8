"""Rounds of a reconstruction: how many follow each other, and the weights behind them."""

import itertools
import math

import pytest
import torch
from helpers.commands import tensors_of
from helpers.reconstructed import RATE, WINDOWS, run

from sparsefw.driver import reconstruct
from sparsefw.driver.reconstruct import Fit
from sparsefw.model.activations import split_batches

pytestmark = pytest.mark.usefixtures("constants")

FLAGS = ["--method", "wanda", "--include", "layers.0", "--reconstruct", "1"]
STEPS = len(split_batches(WINDOWS)[0])


@pytest.mark.parametrize(
    ("found", "steps", "after", "put_back"),
    [
        # Others follow as long as one pays, up to four.
        ([0.9, 0.8, 0.79], 3, 0.79, False),
        ([0.9, 0.8, 0.7, 0.6], 4, 0.6, False),
        # A last one that has lost is put back, those before it stay.
        ([0.9, 0.95], 2, 0.9, False),
        ([math.nan], 1, math.nan, True),
    ],
)
def test_rounds_follow_each_other_as_long_as_they_pay(found, steps, after, put_back, llama, tmp_path, monkeypatch):
    losses = iter(found)
    monkeypatch.setattr(reconstruct, "MOST_ROUNDS", 4)
    monkeypatch.setattr(Fit, "loss", lambda self: 1.0)
    monkeypatch.setattr(Fit, "round", lambda self, weights, steps, before: next(losses))
    report, _ = run(llama, tmp_path / "out", *FLAGS)
    record = report.blocks[0].reconstruction
    assert next(losses, None) is None
    assert record.steps == steps * STEPS
    assert record.put_back is put_back
    assert record.after == pytest.approx(after, nan_ok=True)


@pytest.mark.parametrize(("rate", "gains"), [(RATE, True), (1e3, False)], ids=["gains", "loses"])
def test_a_second_round_begins_behind_the_first_and_is_put_back_to_there(rate, gains, llama, tmp_path, monkeypatch):
    losses, weights, measure = [], [], Fit.loss

    def watched(fit):
        losses.append(measure(fit))
        block = fit.run.model.blocks[fit.number]
        weights.append({f"model.layers.0.{name}": x.detach().clone() for name, x in block.named_parameters()})
        # Rounds after the first have this rate.
        monkeypatch.setattr(reconstruct, "RATE", rate if len(losses) > 1 else RATE)
        return losses[-1]

    monkeypatch.setattr(Fit, "loss", watched)
    monkeypatch.setattr(reconstruct, "MOST_ROUNDS", 2)
    monkeypatch.setattr(reconstruct, "WORTH", 0.0)
    report, _ = run(llama, tmp_path / "out", *FLAGS)
    before, first, second = losses
    assert first < before
    assert (second < first) is gains
    found = report.blocks[0].reconstruction
    assert (found.before, found.after) == (before, min(first, second))
    assert found.steps == 2 * STEPS
    assert not found.put_back
    written = tensors_of(tmp_path / "out")
    for layer in report.layers:
        of_round = [behind[layer.name] for behind in weights]
        assert torch.equal(written[layer.name], of_round[2 if gains else 1])
        assert all((a != b).sum() > 0.9 * (a != 0).sum() for a, b in itertools.pairwise(of_round))
