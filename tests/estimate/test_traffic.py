"""The bytes that ranks are expected to send are those that they send."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.families import save_model
from helpers.planning import SEQLEN, make_config, planned
from helpers.ranks import on_ranks

from sparsefw.driver import CheckpointJob, Output, reconstruct, run_job
from sparsefw.estimate.traffic import imbalance, traffic
from sparsefw.inputs import Inputs

WINDOWS = 13


def sent(ranks, source, output, config, windows):
    """What a run has sent from this rank, and what rank 0 has sent for each block."""
    tokens = torch.randint(2, 250, (windows, SEQLEN), generator=torch.Generator().manual_seed(0))
    job = CheckpointJob(Inputs(model=str(source)), config, Output(output), source, dataset=tokens)
    with pytest.MonkeyPatch.context() as patch:
        # How many rounds follow the first one depends on the weights.
        patch.setattr(reconstruct, "MOST_ROUNDS", 1)
        report = run_job(job, lambda line: None, False, ranks)
    return Counter(ranks.sent), [Counter(block.sent) for block in report.blocks]


# Rows are shared out, with each kind of cross matrix; experts go whole to ranks, and so do layers.
@pytest.mark.parametrize(
    ("family", "count", "options"),
    [
        ("llama", 2, {"steps": 1, "rounds": 0, "refit": 1}),
        ("llama", 3, {"method": "wanda", "dtype": torch.bfloat16}),
        ("llama", 3, {"steps": 0, "refit": 0, "ignore": ("layers.1", "up_proj"), "compare": ("magnitude",)}),
        ("llama", 3, {"steps": 1, "rounds": 0, "refit": 1, "sparsity": "layer:0.5"}),
        ("llama", 3, {"steps": 1, "sparsity": "layer:0.5", "preset": "paper", "target": "dense"}),
        ("llama", 3, {"method": "sparsegpt"}),
        ("gpt_neox", 3, {"steps": 1, "rounds": 0, "refit": 1}),
        ("gpt2", 2, {"steps": 0, "refit": 0, "target": "dense"}),
        ("mixtral", 3, {"steps": 1, "rounds": 0, "refit": 1}),
        ("mixtral", 2, {"method": "wanda"}),
        ("mixtral", 3, {"method": "sparsegpt"}),
        ("llama", 2, {"method": "wanda", "reconstruct": 2}),
        ("llama", 3, {"steps": 1, "rounds": 0, "refit": 1, "reconstruct": 1, "dtype": torch.bfloat16}),
        ("llama", 3, {"method": "wanda", "ignore": ("layers.1", "up_proj"), "reconstruct": 2}),
        ("gpt2", 2, {"method": "sparsegpt", "reconstruct": 1}),
        # Gradients are those of whole parameters, of which some experts stay dense.
        ("mixtral", 3, {"method": "wanda", "reconstruct": 1, "ignore": ("re:.*experts.*[01].",)}),
        # Four micro-batches of one rank, five of the other.
        ("mixtral", 2, {"method": "wanda", "reconstruct": 2, "windows": 17}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_sent(family, count, options, tmp_path):
    options, depth = dict(options), "n_layer" if family == "gpt2" else "num_hidden_layers"
    source = save_model(tmp_path / "model", family, options.pop("dtype", torch.float32), **{depth: 2})
    windows = options.pop("windows", WINDOWS)
    config = make_config(**options)
    results = on_ranks(count, sent, source, tmp_path / "out", config, windows)
    plan = planned(source, config, windows, ranks=count)
    if config.reconstruct:
        # A window at a time, of so few.
        plan = replace(plan, placement=replace(plan.placement, batch=1))
    expected = [traffic(plan, block) for block in plan.shape.blocks]
    assert expected[0].waited > 0
    for number, (of_run, of_blocks) in enumerate(results):
        assert of_run == sum((Counter(one.of_rank(number)) for one in expected), Counter())
        assert of_blocks == [+Counter(one.of_rank(0)) for one in expected]


def test_alone_nothing_is_sent(tmp_path):
    plan = planned(save_model(tmp_path / "model", "llama"), make_config(), 4)
    one = traffic(plan, plan.shape.blocks[0])
    assert one.waited == 0
    assert one.most == {"sum": 0, "sum_at": 0, "spread": 0}


def test_imbalance(tmp_path):
    """Three ranks have 5, 5 and 4 of 14 windows. A stage of 64 rows and one of 96 go to one and to two of them."""
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    plan = planned(source, make_config(method="wanda"), 14, ranks=3)
    (block,) = plan.shape.blocks
    # Rows by stage: of q, k, v; o; gate and up; down.
    rows, widths, most = (64, 32, 96, 32), (32, 32, 32, 48), (64, 64, 64, 64)
    share, mean = (sum(n * d * d for n, d in zip(of, widths, strict=True)) for of in (most, rows))
    assert imbalance(plan, block) == {"windows": pytest.approx(15 / 14), "rows": pytest.approx(3 * share / mean)}


def test_imbalance_of_experts(tmp_path):
    """Of four experts one rank of three has two."""
    plan = planned(save_model(tmp_path / "model", "mixtral"), make_config(steps=1), 9, ranks=3)
    found = imbalance(plan, plan.shape.blocks[0])
    assert found["windows"] == 1
    assert found["whole"] == pytest.approx(1.5)
