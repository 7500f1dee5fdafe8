"""Totals: the least seconds of a run, from numbers small enough to follow."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.families import save_model
from helpers.planning import BATCH, SEQLEN, make_config, planned

from sparsefw import checkpoint
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.windows import Windows
from sparsefw.driver import reconstruct
from sparsefw.driver.block import Run
from sparsefw.driver.loop import prune_model
from sparsefw.estimate import rates, totals
from sparsefw.estimate.flops import head, operations
from sparsefw.estimate.memory import disk_space
from sparsefw.estimate.operation import Operation
from sparsefw.estimate.rates import Rates
from sparsefw.kernels.cost import Cost
from sparsefw.model import StreamedModel, predictions
from sparsefw.model.activations import FiledActivations


@pytest.fixture
def plan(tmp_path):
    return planned(save_model(tmp_path / "model", "llama"), make_config(compare=("wanda",), steps=3), 6, (2,))


@pytest.mark.parametrize("ahead", [True, False])
def test_nothing_but_the_disk(plan, ahead):
    plan = replace(plan, placement=replace(plan.placement, ahead=ahead))
    speed = Rates(dict.fromkeys(rates.UNITS, math.inf), math.inf, 7.0, "")
    traffic = totals.disk_traffic(plan)
    assert totals.seconds(plan, speed) == pytest.approx((traffic["read"] + traffic["write"]) / 7)


def test_nothing_but_the_work(plan):
    speed = Rates(dict.fromkeys(rates.UNITS, 1e3), math.inf, None, "")
    flops = totals.phases(plan)["all"]["run"]["flops"]
    assert totals.seconds(plan, speed) == pytest.approx(flops / 1e3)
    by_phase = totals.phase_seconds(plan, speed)
    assert sum(by_phase.values()) == pytest.approx(flops / 1e3)
    assert by_phase["solve"] == pytest.approx(totals.phases(plan)["solve"]["run"]["flops"] / 1e3)


def test_a_block_is_not_the_last_one_which_has_more_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "LEAST", 1)
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=3)
    plan = planned(source, make_config(method="wanda", reconstruct=1), 6)
    first, _, last = (
        sum(x.cost.flops for x in operations(plan, block) if x.phase == "reconstruct") for block in plan.shape.blocks
    )
    found = totals.phases(plan)["reconstruct"]
    assert found["block"]["flops"] == first < last
    assert found["run"]["flops"] == 2 * first + last + sum(x.cost.flops for x in head(plan))


def test_the_disk_beside_the_work(plan):
    """With reading ahead, work hides the disk, except for the first read, the last write and the tensors outside of
    the blocks."""
    slow = Rates(dict.fromkeys(rates.UNITS, 1.0), math.inf, 1e6, "")
    apart = replace(plan, placement=replace(plan.placement, ahead=False))
    sizes = [block.nbytes for block in plan.shape.blocks]
    hidden = sum(sizes[1:]) + 2 * sum(sizes[:-1])
    difference = totals.seconds(apart, slow) - totals.seconds(plan, slow)
    assert difference == pytest.approx(hidden / 1e6, rel=1e-3)


def test_the_larger_of_flops_and_bytes():
    speed = Rates({"bf16": 10.0}, 100.0, None, "")
    first, second = (Operation("solve", "any", "bf16", 1, Cost(*of)) for of in ((50, 100), (10, 1000)))
    assert rates.seconds([first, second], speed) == 5 + 10


@pytest.mark.parametrize(("family", "blocks", "streams"), [("llama", 3, 1), ("gemma3n_text", 6, 4)])
def test_activations_in_a_file(family, blocks, streams, tmp_path):
    """Every pass reads activations, passes that advance also write them, and all of them wait for the disk."""
    source = save_model(tmp_path / "model", family)
    plan = planned(source, make_config(refit=0), 6, place="file")
    # Without what blocks hand on.
    size = 6 * plan.shape.of_stream(SEQLEN)[0]
    assert size == 6 * SEQLEN * 32 * 4 * streams
    assert (disk_space(plan.shape, plan.workload, plan.placement)["activations"] == size) == (family == "llama")
    traffic = totals.disk_traffic(plan)
    assert (traffic["calibrate"], traffic["forward"]) == (blocks * size, blocks * 2 * size)
    speed = Rates(dict.fromkeys(rates.UNITS, math.inf), math.inf, 1.0, "")
    assert totals.seconds(plan, speed) == pytest.approx(traffic.total())


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=1, rounds=0, refit=1),
        dict(steps=1, rounds=0, refit=1, reconstruct=2),
        dict(steps=1, rounds=0, refit=1, reconstruct=1, ignore=("layers.0",), compare=("magnitude",)),
        dict(method="magnitude", reconstruct=2),
    ],
    ids=str,
)
def test_a_run_reads_and_writes_activations_as_counted(options, tmp_path, monkeypatch):
    """What is asked of the file, and not what is read ahead and then not asked for."""
    monkeypatch.setattr(reconstruct, "MOST_ROUNDS", 1)
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
    plan = planned(source, make_config(**options), 7, place="file")
    config, done, read, write = plan.workload.config, [], FiledActivations.__getitem__, FiledActivations.__setitem__

    def counted(hidden):
        # Not what blocks are given beside the hidden states.
        if hidden.shape[1:] == (SEQLEN, plan.shape.hidden):
            done.append(hidden.nbytes)
        return hidden

    monkeypatch.setattr(FiledActivations, "__getitem__", lambda self, j: counted(read(self, j)))
    monkeypatch.setattr(FiledActivations, "__setitem__", lambda self, j, hidden: write(self, j, counted(hidden)))
    model = StreamedModel(checkpoint.inspect(source), torch.device("cpu"))
    shape, solver = plan.shape, plan.placement.solver
    predicts = shape.blocks[-1].predicts
    experts = tuple(block.experts for block in shape.blocks)
    layers = frozenset(shape.layer_names)
    run = Run(model, config, config.backend, solver, layers, predicts=predicts, experts=experts)
    windows = Windows(torch.randint(2, 250, (7, SEQLEN), generator=torch.Generator().manual_seed(0)), "text", "")
    with Writer(tmp_path / "out", len(model.blocks) + len(model.pieces)) as writer:
        prune_model(run, windows, [], writer, replace(plan.placement, folder=tmp_path))
        writer.finish(source)
    window = plan.shape.of_stream(SEQLEN)[0]
    # Windows are embedded, and copied for every stream but the first. The first micro-batch shows that there are
    # predictions.
    streams = len(config.methods) + config.uses_dense_stream
    beside = 7 * window * (1 + 2 * (streams - 1)) + BATCH * window * (config.reconstruct > 0)
    assert sum(done) == totals.disk_traffic(plan).total() - on_disk_alone(plan) + beside


def on_disk_alone(plan):
    """Bytes of the same run with its activations in memory."""
    return totals.disk_traffic(replace(plan, placement=replace(plan.placement, place="gpu"))).total()
