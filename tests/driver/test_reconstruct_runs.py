"""Runs with a reconstruction: put back, gone on with, placed otherwise, beside compared methods, and in the log."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.commands import tensors_of
from helpers.reconstructed import METHODS, WINDOWS, flags_of, make_place, run, shards, without_times
from transformers import AutoModelForCausalLM

from sparsefw.driver import job, reconstruct
from sparsefw.driver import run as driver_run
from sparsefw.model.activations import split_batches
from sparsefw.run import main

pytestmark = pytest.mark.usefixtures("constants")


@pytest.mark.parametrize(
    ("way", "rate"),
    [
        ("wanda", 1e30),
        ("dense targets", 1e3),
    ],
)
def test_a_block_that_gets_worse_is_put_back(way, rate, llama, tmp_path, monkeypatch):
    """Then its weights are what they were, bit for bit, even if they had gone beyond all numbers."""
    evaluation = ["--eval", str(llama / "text.txt"), "--eval-windows", "2"]
    monkeypatch.setattr(reconstruct, "RATE", rate)
    report, seen = run(llama, tmp_path / "out", *METHODS[way], *evaluation, "--reconstruct", "1")
    assert all(block.reconstruction.put_back for block in report.blocks)
    # Loads, whatever the losses are.
    assert all(math.isnan(x.after) or x.after >= x.before for x in (b.reconstruction for b in report.blocks))
    written = tensors_of(tmp_path / "out")
    for i, block in enumerate(report.blocks):
        assert seen.weights[i]
        for name, before in seen.weights[i].items():
            assert torch.equal(written[f"{block.name}.{name}"], before)
    # Nothing of what was put back runs on through the model.
    again, _ = run(llama, tmp_path / "again", *METHODS[way], *evaluation, "--reconstruct", "1")
    assert again.evaluation == report.evaluation
    assert all(math.isfinite(x) for x in report.evaluation[0].perplexity.values())


@pytest.mark.parametrize(
    ("way", "family"),
    [
        ("wanda", "llama"),
        ("dense targets", "llama"),
        # Its experts are watched while the block runs, and outputs are compared.
        ("dense targets", "qwen3_moe"),
    ],
)
def test_nothing_is_fitted_to_what_is_held_out(way, family, tmp_path, monkeypatch):
    """Layers are those of a run on the other windows alone, up to the first block that is reconstructed."""
    folder = make_place(tmp_path, family)
    report, seen = run(folder, tmp_path / "out", *METHODS[way], "--reconstruct", "1")
    drawn = job.data.mixed_windows
    learned, _ = split_batches(WINDOWS)

    def fewer(*args, nsamples, **kwargs):
        windows = drawn(*args, nsamples=WINDOWS, **kwargs)
        return replace(windows, ids=windows.ids[learned])

    monkeypatch.setattr(job.data, "mixed_windows", fewer)
    alone, _ = run(folder, tmp_path / "alone", *METHODS[way], "--nsamples", str(len(learned)))
    loaded, (first, *_) = AutoModelForCausalLM.from_pretrained(tmp_path / "alone"), report.blocks
    written = dict(loaded.named_parameters())
    for name, before in seen.weights[0].items():
        assert torch.equal(written[f"{first.name}.{name}"], before)
    errors = [[layer.error for layer in one.layers if ".layers.0." in layer.name] for one in (report, alone)]
    assert errors[0] == errors[1]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a mixture in bf16, a text, and what a run gives."""
    folder = make_place(tmp_path_factory.mktemp("mixture"), "qwen3_moe", torch.bfloat16)
    report, _ = run(folder, folder / "out", *MIXTURE, "--eval", str(folder / "text.txt"))
    return folder, report


MIXTURE = [
    *METHODS["masks only, dense targets"],
    "--nsamples",
    "10",
    "--reconstruct",
    "1",
    "--compare",
    "wanda",
    "--eval-windows",
    "2",
]


@pytest.mark.slow
@pytest.mark.parametrize("line", ["layers.1.mlp.experts", "layers.2: reconstructed"])
def test_goes_on_with_the_same_bytes(line, mixture, tmp_path, monkeypatch):
    """Finished blocks keep their reconstructed weights, and their losses."""
    folder, expected = mixture
    say = driver_run.log.layer_row, driver_run.log.reconstruction_row

    def interrupted(write):
        def row(*args):
            if line in (text := write(*args)):
                raise KeyboardInterrupt
            return text

        return row

    flags = [*MIXTURE, "--eval", str(folder / "text.txt")]
    with monkeypatch.context() as patch:
        patch.setattr(driver_run.log, "layer_row", interrupted(say[0]))
        patch.setattr(driver_run.log, "reconstruction_row", interrupted(say[1]))
        assert main([*flags_of(folder, tmp_path / "out"), *flags]) == 130
    assert (tmp_path / ".out.partial").exists()
    report, seen = run(folder, tmp_path / "out", *flags)
    # Finished blocks are not reconstructed again.
    assert min(seen.weights) == int(line[7])
    assert shards(tmp_path / "out") == shards(folder / "out")
    assert without_times(report) == without_times(expected)


@pytest.mark.parametrize(("windows", "said"), [(1, True), (2, False)])
def test_one_window_is_too_few_and_the_log_says_so(windows, said, llama, tmp_path, capsys):
    report, _ = run(llama, tmp_path / "out", "--nsamples", str(windows))
    assert all((block.reconstruction is None) == said for block in report.blocks)
    assert (report.arguments["reconstruct"] == 0) == said
    assert (
        "note: no block is reconstructed: that takes two calibration windows on every rank" in capsys.readouterr().out
    ) == said
