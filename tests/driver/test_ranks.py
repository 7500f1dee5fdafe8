"""A run that several ranks share: what one process gives, but for rounding, and the same bytes every time."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import refused
from helpers.commands import shards, tensors_of
from helpers.families import first_is_fast, save_model
from helpers.ranks import on_ranks, prune
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from sparsefw.data.batches import BATCHES
from sparsefw.driver import prune as driver
from sparsefw.driver import streams
from sparsefw.driver.partition import find_solves
from sparsefw.driver.texts import with_defaults
from sparsefw.errors import InputError
from sparsefw.inputs import Inputs
from sparsefw.model.layers import Layer
from sparsefw.model.measure import Captured
from sparsefw.ranks import ALONE, LostRankError, Ranks
from sparsefw.report import log
from sparsefw.solver.config import PruneConfig


def prune_watched(ranks, *args):
    """`prune`; the report, which is that of rank 0, and the layers and perplexities that this rank found."""
    found, perplexity = {"layers": [], "perplexities": []}, streams.perplexity

    def row(layer, block):
        # Each rank takes its own time for its rows.
        found["layers"].append(replace(layer, seconds=0))
        return ""

    def measured(*args):
        found["perplexities"].append(perplexity(*args))
        return found["perplexities"][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "layer_row", row)
        patch.setattr(streams, "perplexity", measured)
        report, _ = prune(ranks, *args)
    return report, found


def differing(first, second):
    """The share of the entries that only one of two checkpoints keeps."""
    pairs = [(W != 0, second[name] != 0) for name, W in first.items() if W.dim() > 1]
    return sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)


# Rows are shared out; whole layers go to ranks, since a budget, a saliency or a decomposition is of all their rows; and
# experts do.
@pytest.mark.parametrize(("family", "config"), first_is_fast([
    ("llama", {"method": "sparsegpt"}),
    ("llama", {"sparsity": "layer:0.5", "preset": "paper", "steps": 9, "target": "dense"}),
    ("mixtral", {"method": "ria", "compare": ("wanda",)}),
]), ids=str)  # fmt: skip
def test_masks_are_those_of_one_process(family, config, tmp_path, text):
    source = save_model(tmp_path / "model", family, num_hidden_layers=2)
    alone, _ = prune(ALONE, source, tmp_path / "alone", text, config)
    (report, found), *others = on_ranks(3, prune_watched, source, tmp_path / "three", text, config)
    assert all(other == found for _, other in others)
    assert len(found["layers"]) == len(report.layers)
    assert found["perplexities"] == [*report.evaluation[0].perplexity.values()]
    assert differing(tensors_of(tmp_path / "alone"), tensors_of(tmp_path / "three")) <= 1e-3
    assert [x.name for x in report.layers] == [x.name for x in alone.layers]
    for mine, theirs in zip(report.layers, alone.layers, strict=True):
        assert (mine.kept, mine.shape, mine.gap is None) == (theirs.kept, theirs.shape, theirs.gap is None)
        for name in ("error", "error_mask", "relative_error", "relative_mask"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-3)
    for name, value in report.evaluation[0].perplexity.items():
        assert value == pytest.approx(alone.evaluation[0].perplexity[name], rel=1e-4)
    assert [rank.windows for rank in report.ranks] == [3, 3, 4]
    assert not alone.ranks


@pytest.mark.slow
def test_more_ranks_than_windows_or_rows(tmp_path, text):
    """Ranks without windows of a text, and without rows of a layer, still take part."""
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
    alone, _ = prune(ALONE, source, tmp_path / "alone", text, {"method": "wanda"}, 6, eval_windows=3)
    inputs = on_ranks(5, prune, source, tmp_path / "five", text, {"method": "wanda"}, 6, 3)
    assert differing(tensors_of(tmp_path / "alone"), tensors_of(tmp_path / "five")) <= 1e-3
    assert inputs[0][0].evaluation[0].perplexity["dense"] == pytest.approx(
        alone.evaluation[0].perplexity["dense"], rel=1e-5
    )


def fail_at(ranks, number, block, *args):
    """`prune`, and a rank that fails when it comes to a block."""
    real = driver.prune_block

    def prune_block(run, i, *others):
        if ranks.number == number and i == block:
            raise InputError("no more")
        return real(run, i, *others)

    driver.prune_block = prune_block
    try:
        prune(ranks, *args)
    except (InputError, LostRankError) as error:
        dist.destroy_process_group()
        return type(error).__name__
    finally:
        driver.prune_block = real
    return "finished"


def varying(ranks, do, *args):
    """Call do(ranks, *args), with an operation on rank 1 that torch refuses where bits have to be the same."""
    forward = MixtralRMSNorm.forward

    def refused(self, x):
        return forward(self, x) + x.new_zeros(1).put_(torch.tensor([0], device=x.device), x.new_zeros(1))

    with pytest.MonkeyPatch.context() as patch:
        if ranks.number == 1:
            patch.setattr(MixtralRMSNorm, "forward", refused)
        return do(ranks, *args)


@pytest.mark.slow
def test_a_run_is_resumed_by_the_same_number_of_ranks(tmp_path, out, text):
    """Finished blocks are reported as without an interruption.

    Rank 1 has written the second one.
    """
    source = save_model(tmp_path / "model", "mixtral")
    on = text, {"method": "wanda", "reconstruct": 1}, 6, 2
    (whole, lines), _ = on_ranks(2, varying, prune, source, tmp_path / "whole", *on)
    assert [block.reconstruction.varies for block in whole.blocks] == ["put_"] * 3
    assert sum("another run may give other bits: put_" in line for line in lines) == 3
    ends = on_ranks(2, varying, fail_at, 0, 2, source, out, *on)
    assert ends == ["InputError", "LostRankError"]
    assert not out.exists()
    with pytest.raises(AssertionError, match=r"an unfinished run .* the number of ranks was 2, and is 3"):
        on_ranks(3, prune, source, out, *on)
    # No operation is refused now: those that are named come from the records.
    (report, lines), _ = on_ranks(2, prune, source, out, *on)
    assert any(line.startswith("resuming an unfinished run: 2 of ") for line in lines)
    assert [block.reconstruction.varies for block in report.blocks] == ["put_", "put_", ""]
    for mine, theirs in zip(report.blocks[:2], whole.blocks, strict=False):
        assert mine.reconstruction == theirs.reconstruction
    assert shards(out) == shards(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_other_flags_on_a_rank_are_named(source, tmp_path, text):
    line = "rank 2: sparsity is 0.5, and that of rank 0 is 0.6; start all ranks with the same call"
    found = on_ranks(3, prune_own, 3 * [source], [{}, {}, {"sparsity": "0.5"}], tmp_path / "out", text)
    assert found == 3 * [line]
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(("dataset", "named"), [("c4", "nsamples"), (BATCHES, "calibration")])
def test_every_rank_needs_a_window(dataset, named):
    job = SimpleNamespace(ranks=SimpleNamespace(count=2), inputs=Inputs(model="m", dataset=(dataset,)))
    with refused(f"^{named}: 1 for 2 ranks; give at least one for each rank$"):
        with_defaults(job, 1, 8)


def test_another_model_on_a_rank_is_named(tmp_path, text):
    """Each machine may have a folder of its own, here with other weights and the same config."""
    sources = [save_model(tmp_path / f"model-{seed}", "llama", seed=seed) for seed in (0, 1)]
    found = on_ranks(2, prune_own, sources, [{}, {}], tmp_path / "out", text)
    assert all(line.startswith("rank 1: the digest of the model's weights is ") for line in found)
    assert not (tmp_path / ".out.partial").exists()


def prune_own(ranks, sources, configs, *args):
    with pytest.raises(InputError) as refused:
        prune(ranks, sources[ranks.number], *args, configs[ranks.number] | {"method": "magnitude"})
    return str(refused.value)


@pytest.mark.parametrize("ranks", [ALONE, Ranks(1, 2)], ids=["alone", "shared"])
def test_layers_of_one_input_and_one_dtype(ranks):
    """Ranks share the rows of a stack, and a stack has one dtype."""
    W = torch.ones(3, 4)
    layers = [Layer("q", W.half(), "q"), Layer("k", W, "q"), Layer("v", W.half(), "q"), Layer("o", W, "o")]
    solves = find_solves(Captured(layers, {}, {}, []), "sparsefw", PruneConfig(kernel="torch"), ranks, frozenset())
    assert [[layer.name for layer in solve.layers] for solve in solves] == [["q", "v"], ["k"], ["o"]]
    assert [solve.gram for solve in solves] == ["q", "q", "o"]
