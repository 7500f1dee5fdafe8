"""Flops and bytes that are counted are those of a run, on the device and on the disk."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.counting import OPERATIONS, counting
from helpers.families import FAMILIES, save_model
from helpers.planning import BATCH, SEQLEN, make_config, planned
from helpers.ranks import on_ranks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sparsefw import checkpoint
from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.windows import Windows
from sparsefw.driver import reconstruct
from sparsefw.driver.block import Run
from sparsefw.driver.loop import prune_model
from sparsefw.estimate import flops as estimated
from sparsefw.estimate import totals
from sparsefw.estimate.flops import head, operations
from sparsefw.estimate.memory import disk_space
from sparsefw.estimate.passes import passes
from sparsefw.estimate.sharing import find_solves, groups, work_by_rank
from sparsefw.model import HiddenStates, StreamedModel, predictions
from sparsefw.model.placement import split_batches
from sparsefw.ranks import ALONE
from sparsefw.solver import PruneConfig, patterns
from sparsefw.solver.kept_weights import KeptWeights

# The products of a solve, by the names of their operations.
PRODUCTS = {"cross", "target", "start", "step", "refit", "error"}


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    """How many rounds of a reconstruction follow the first depends on the weights. Short windows are like long ones."""
    monkeypatch.setattr(reconstruct, "MOST_ROUNDS", 1)
    monkeypatch.setattr(predictions, "LEAST", 1)


class Products(TorchFunctionMode):
    """Sums the flops of linear layers and of products with slices of stacked weights, but for routers."""

    def __init__(self, routers):
        super().__init__()
        self.flops, self.routers = 0, routers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[1].shape[0] not in self.routers and not args[0].is_meta:
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        return func(*args, **(kwargs or {}))


class Known(dict):
    """Knows of every block that it can be run in parts. To find that out, a run takes a few micro-batches once."""

    def __contains__(self, signature):
        return True

    def __getitem__(self, signature):
        return True


def prune(source, plan, tmp_path, monkeypatch, counter=None, ranks=ALONE):
    """Run the plan, and count everything that this rank does, but not what opening the model takes.

    Args:
        counter: a counter of flops to enter, too.
    """
    backend, seen = counting()

    def read(tensors, pin=False):
        seen["read"] += sum(tensor.nbytes for tensor in tensors.values())
        return read_tensors(tensors, pin)

    call, save = HiddenStates.call, Writer._save

    def counted_call(self, *args, **kwargs):
        seen["calls"] += 1
        return call(self, *args, **kwargs)

    def counted_save(self, path, tensors):
        seen["write"] += sum(tensor.nbytes for tensor in tensors.values())
        save(self, path, tensors)

    step = KeptWeights.step

    def counted_step(self):
        seen["adam"] += 1
        step(self)

    monkeypatch.setattr(KeptWeights, "step", counted_step)
    monkeypatch.setattr(HiddenStates, "call", counted_call)
    monkeypatch.setattr(Writer, "_save", counted_save)
    model = StreamedModel(checkpoint.inspect(source), torch.device("cpu"), read)

    def windows(n):
        generator = torch.Generator().manual_seed(n)
        return Windows(torch.randint(2, 250, (n, SEQLEN), generator=generator), f"text {n}", "")

    workload, placement = plan.workload, replace(plan.placement, folder=tmp_path)
    evaluation = [windows(n) for n in workload.evaluation]
    layers = frozenset(plan.shape.layer_names)
    run = Run(
        model, workload.config, backend, placement.solver, layers, placement.kept_width, ranks=ranks, confirmed=Known(),
        predicts=plan.shape.blocks[-1].predicts, experts=tuple(block.experts for block in plan.shape.blocks),
    )  # fmt: skip
    products = Products({4})
    shards = len(model.blocks) + len(model.pieces)
    with counter or nullcontext(), products, Writer(tmp_path / "out", shards, ranks=ranks) as writer:
        prune_model(run, windows(workload.windows), evaluation, writer, placement)
        writer.finish(source)
    return seen, products.flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict(steps=4)),
        ("llama", dict(steps=4, compare=("wanda", "sparsegpt"))),
        ("llama", dict(steps=4, refit=0)),
        ("llama", dict(method="magnitude")),
        ("llama", dict(steps=4, ignore=("layers.1", "up_proj"))),
        ("llama", dict(steps=4, ignore=("layers.0",), target="layer")),
        ("llama", dict(steps=4, include=("q_proj", "down_proj"), compare=("wanda",))),
        ("gpt_neox", dict(steps=4)),
        # Attention and MLP read one input, and the attention's output is used between them.
        ("phi", dict(steps=4)),
        ("phi", dict(steps=4, refit=0)),
        ("llama", dict(method="wanda", reconstruct=3)),
        ("llama", dict(steps=4, compare=("wanda",), reconstruct=1, ignore=("layers.1",))),
        ("mixtral", dict(steps=4)),
        ("mixtral", dict(method="wanda", reconstruct=2)),
        ("qwen2_moe", dict(steps=4, compare=("wanda",))),
    ],
)
def test_a_run_does_what_is_counted(family, options, tmp_path, monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.setitem(FAMILIES, "phi", {})
    source = save_model(tmp_path / "model", family, num_hidden_layers=2)
    # An odd number of windows, so that one micro-batch is smaller than the others.
    plan = planned(source, make_config(**options), 7, (3, 4))
    seen, flops = prune(source, plan, tmp_path, monkeypatch)
    blocks, workload = plan.shape.blocks, plan.workload
    runs = [windows_pass for block in blocks for windows_pass in passes(block, workload, plan.placement)]
    assert seen["calls"] == sum(-(-windows_pass.windows // BATCH) for windows_pass in runs)
    # The mode sees no gradients, as `test_torch_counts_the_same_flops` does.
    monkeypatch.setattr(estimated, "_products", lambda block, n: 1)
    done = [operation for block in blocks for operation in operations(plan, block)]
    layers = {layer.name for block in blocks for layer in block.all_layers}
    forward = sum(operation.cost.flops for operation in done if operation.name in layers)
    forward += sum(operation.cost.flops for operation in head(plan) if operation.name == "head")
    by_name = Counter()
    for operation in done:
        by_name[operation.name] += operation.calls
    assert seen["adam"] == by_name["adam"]
    products = [
        operation for operation in done if operation.name in {"cross", "target", "start", "step", "refit", "error"}
    ]
    made = sum(operation.calls for operation in products)
    if family in ("llama", "gpt_neox", "phi"):
        assert flops == forward
        assert seen["product"] == made
        assert {name: seen[name] for name in OPERATIONS[1:]} == {name: by_name[name] for name in OPERATIONS[1:]}
        assert seen["flops"] == sum(operation.cost.flops for operation in products)
    else:
        # Experts take turns, and one may see no token of a micro-batch.
        assert flops == pytest.approx(forward, rel=0.02)
        assert 0.8 * made <= seen["product"] <= made
        assert 0.8 * by_name["gram_accumulate"] <= seen["gram_accumulate"] <= by_name["gram_accumulate"]
        assert seen["cross_accumulate"] == by_name["cross_accumulate"]
    traffic = totals.disk_traffic(plan)
    assert (seen["read"], seen["write"]) == (traffic["read"], traffic["write"])
    index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    assert disk_space(plan.shape, workload, plan.placement)["output"] == index["metadata"]["total_size"]


def prune_as_rank(ranks, source, plan, folder):
    """`prune` as one of several ranks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return prune(source, plan, folder, monkeypatch, ranks=ranks)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict(steps=2, rounds=0, refit=1)),
        ("llama", dict(method="wanda", compare=("magnitude",))),
        ("llama", dict(method="sparsegpt")),
    ],
    ids=str,
)
def test_a_rank_does_what_is_counted(family, options, tmp_path):
    """The last rank has the most windows."""
    source = save_model(tmp_path / "model", family, num_hidden_layers=1)
    plan = planned(source, make_config(**options), 7, (3,), ranks=2)
    results = on_ranks(2, prune_as_rank, source, plan, tmp_path)
    seen, flops = results[1]
    done = operations(plan, plan.shape.blocks[0])
    layers = {layer.name for layer in plan.shape.blocks[0].all_layers}
    forward = sum(operation.cost.flops for operation in [*done, *head(plan)] if operation.name in {*layers, "head"})
    assert flops == forward
    by_name = Counter()
    for operation in done:
        by_name[operation.name] += operation.calls
    for name in ("gram_accumulate", "cross_accumulate"):
        assert seen[name] == by_name[name]
    products = [operation for operation in done if operation.name in PRODUCTS]
    mirrored = max(of_rank["mirror_lower"] for of_rank, _ in results)
    if options.get("method") == "sparsegpt":
        (group,) = groups(plan.shape.blocks[0], plan.workload.config, "sparsegpt")
        solves = [solve for of_gram in find_solves(group, "sparsegpt", plan.workload.config, 2) for solve in of_gram]
        work = work_by_rank(solves, 2)
        # The most matrices of each input, which no rank need have of all of them.
        assert mirrored <= by_name["mirror_lower"] <= mirrored + 1
    else:
        work = [of_rank["flops"] for of_rank, _ in results]
        assert mirrored == by_name["mirror_lower"]
    solving, _ = results[work.index(max(work))]
    assert solving["product"] == sum(operation.calls for operation in products)
    assert solving["flops"] == sum(operation.cost.flops for operation in products)


class RealFlops(FlopCounterMode):
    """Counts what is multiplied, but not on tensors without data."""

    def _count_flops(self, func_packet, out, args, kwargs):
        meta = any(isinstance(x, torch.Tensor) and x.is_meta for x in args)
        return out if meta else super()._count_flops(func_packet, out, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize(
    ("kept_width", "options"),
    [
        (0, dict(steps=2, rounds=1)),
        (32, dict(steps=2, rounds=1)),
        (48, dict(steps=2, rounds=1)),
        (48, dict(steps=2, rounds=0, reconstruct=2)),
        # Fewer layers have gradients, and what lies before them has none.
        (0, dict(method="wanda", reconstruct=1)),
        (0, dict(method="wanda", reconstruct=1, ignore=("k_proj", "o_proj", "fc1", "dense.weight"))),
        (0, dict(method="wanda", reconstruct=1, include=("o_proj", "down_proj", "out_proj", "h_to_4h"))),
    ],
    ids=str,
)
def test_torch_counts_the_same_flops(family, kept_width, options, tmp_path, monkeypatch):
    kinds = {"layer_types": ["full_attention"]} if family == "gemma2" else {}
    source = save_model(tmp_path / "model", family, num_hidden_layers=1, **kinds)
    plan = planned(source, make_config(**options), 7)
    plan = replace(plan, placement=replace(plan.placement, kept_width=kept_width))
    counter = RealFlops(display=False)
    prune(source, plan, tmp_path, monkeypatch, counter)
    by_operation = counter.get_flop_counts()["Global"]
    counted = sum(by_operation.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    done = [x for block in plan.shape.blocks for x in operations(plan, block)]
    names = {layer.name for block in plan.shape.blocks for layer in block.all_layers} | PRODUCTS
    planned_flops = sum(operation.cost.flops for operation in done if operation.name in names)
    planned_flops += sum(operation.cost.flops for operation in head(plan))
    # Torch does not count products that are added in place, as those of Gram and cross matrices are.
    assert counted == planned_flops


class TestReconstruction:
    """Windows of a block's reconstruction, and what it is made of."""

    @pytest.mark.parametrize(
        ("windows", "learned", "held"), [(7, 6, 1), (8, 6, 2), (16, 14, 2), (33, 31, 2), (32, 30, 2), (64, 60, 4)]
    )
    def test_windows(self, windows, learned, held, tmp_path):
        """Micro-batches have two windows. If there are few, the last one is held out, which may be smaller."""
        plan = planned(save_model(tmp_path, "llama"), make_config(method="wanda", reconstruct=2), windows)
        (block, *_) = plan.shape.blocks
        found = [x for x in passes(block, plan.workload, plan.placement) if x.phase == "reconstruct"]
        assert [(x.windows, x.moves, x.differentiated) for x in found] == [
            (windows, True, False),
            *[(learned, False, True)] * 2,
            *[(held, False, False)] * 2,
        ]
        batches = [list(range(windows))[n : n + BATCH] for n in range(0, windows, BATCH)]
        parts = [[w for j in part for w in batches[j]] for part in split_batches(len(batches))]
        assert [len(part) for part in parts] == [learned, held]

    @pytest.mark.parametrize(("windows", "ranks"), [(1, 1), (3, 2)])
    def test_nothing_where_a_rank_has_one_window(self, windows, ranks, tmp_path):
        plan = planned(save_model(tmp_path, "llama"), PruneConfig(), windows, ranks=ranks)
        assert not [x for x in operations(plan, plan.shape.blocks[0]) if x.phase == "reconstruct"]
        assert not any(x.phase == "reconstruct" for x in passes(plan.shape.blocks[0], plan.workload, plan.placement))

    def test_nothing_without_passes(self, tmp_path):
        plan = planned(save_model(tmp_path, "llama"), make_config(steps=2), 7)
        assert not [x for x in operations(plan, plan.shape.blocks[0]) if x.phase == "reconstruct"]

    def test_experts_that_stay_dense_have_gradients(self, tmp_path):
        """They lie in the parameter of the others. Nothing in them moves."""
        source = save_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
        states = []
        for ignore in ((), ("re:.*down_proj\\[[01]\\]",), ("down_proj",)):
            plan = planned(source, make_config(method="wanda", reconstruct=1, ignore=ignore), 8)
            block = plan.shape.blocks[0]
            (adam,) = [x for x in operations(plan, block) if x.name == "adam"]
            states.append(adam.cost.bytes / adam.calls)
        (down,) = [layer for layer in block.all_layers if "down_proj" in layer.name]
        kept = down.rows * patterns.kept_in_row(plan.workload.config.pattern, down.d)
        # Its weight in fp32 and two moments, in and out; the gradient in and the parameter out.
        assert states[0] - states[1] == 2 * 24 * kept
        assert states[1] - states[2] == (down.experts - 2) * 24 * kept + down.experts * 8 * down.rows * down.d


class TestSelection:
    """Layers that stay dense are run, and cost nothing else."""

    def plans(self, tmp_path, **options):
        source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
        return [
            planned(source, make_config(**options, **which), 7, (3,))
            for which in ({}, dict(ignore=("layers.1", "up_proj")))
        ]

    def flops(self, plan, block, phase):
        return sum(x.cost.flops for x in operations(plan, plan.shape.blocks[block]) if x.phase == phase)

    @pytest.mark.parametrize("options", [{}, dict(refit=0), dict(method="wanda")])
    def test_forward_is_that_of_all_layers(self, options, tmp_path):
        every, some = self.plans(tmp_path, **options)
        for block in range(2):
            assert self.flops(some, block, "evaluate") == self.flops(every, block, "evaluate") > 0
        names = {x.name for x in operations(some, some.shape.blocks[0])}
        assert {layer.name for layer in some.shape.blocks[0].all_layers} <= names

    def test_solves_are_those_of_the_selected_layers(self, tmp_path):
        every, some = self.plans(tmp_path, method="wanda")
        assert self.flops(some, 1, "solve") == 0
        rows = [layer.rows for layer in every.shape.blocks[0].layers if "up_proj" in layer.name]
        (d,) = {layer.d for layer in every.shape.blocks[0].layers if "up_proj" in layer.name}
        errors = self.flops(every, 0, "solve") - self.flops(some, 0, "solve")
        # Gate and up are stacked; either half of them fills the same number of rows up to a multiple of 64.
        padded = [-(-n // 64) * 64 for n in (2 * rows[0], rows[0])]
        assert errors == 2 * (padded[0] - padded[1]) * d * d

    @pytest.mark.parametrize(("target", "runs"), [("layer", []), ("dense", ["7, moves on"])])
    def test_windows_run_through_a_block_without_layers(self, target, runs, tmp_path):
        _, some = self.plans(tmp_path, target=target)
        block = some.shape.blocks[1]
        assert block.layers == ()
        found = list(passes(block, some.workload, some.placement))
        assert {(windows_pass.first, windows_pass.end) for windows_pass in found} == {(0, 7)}
        calibrating = [x for x in found if x.phase == "calibrate"]
        assert [f"{x.windows}{', moves on' if x.moves else ''}" for x in calibrating] == runs

    def test_both_models_move_on_to_the_end_of_every_block(self, tmp_path):
        """The last layers of a block may stay dense, too."""
        source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
        for ignore in ((), ("down_proj",), ("mlp",), ("self_attn",), ("up_proj", "o_proj"), ("layers.0",)):
            plan = planned(source, make_config(ignore=ignore), 7)
            for block in plan.shape.blocks:
                moved = [x for x in passes(block, plan.workload, plan.placement) if x.moves]
                assert [x.phase for x in moved if x.end == 7] == ["calibrate", "forward"]

    def test_experts_share_the_tokens(self, tmp_path):
        source = save_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
        every, some = (
            planned(source, make_config(method="wanda", ignore=ignore), 8)
            for ignore in ((), ("re:.*down_proj\\[[01]\\]",))
        )
        grams = [
            [x for x in operations(plan, plan.shape.blocks[0]) if x.name == "gram_accumulate"] for plan in (every, some)
        ]
        assert grams[1][-1].cost.flops == grams[0][-1].cost.flops / 2  # half of the experts' second matrices
        assert [x.cost for x in grams[1][:-1]] == [x.cost for x in grams[0][:-1]]


@pytest.mark.parametrize("ignore", [(), ("experts.down_proj[1]", "experts.gate_up_proj[1]")])
def test_experts_that_are_multiplied_at_once_see_every_token(ignore, tmp_path, monkeypatch):
    """Whether they are pruned or not; only pruned ones have Gram matrices."""
    changes = {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 40}
    monkeypatch.setitem(FAMILIES, "llama4_text", {"num_local_experts": 4, "attention_chunk_size": 8, **changes})
    source = save_model(tmp_path / "model", "llama4_text", num_hidden_layers=1)
    plan = planned(source, make_config(method="wanda", ignore=ignore), 5)
    block, tokens = plan.shape.blocks[0], 5 * SEQLEN
    pruned = 4 - bool(ignore)
    sizes = {"gate_up_proj": (96, 32), "down_proj": (32, 48)}
    for name, (rows, d) in sizes.items():
        layer = next(layer for layer in block.layers if f"experts.{name}" in layer.name)
        assert (layer.rows, layer.d, layer.experts, layer.parts) == (rows, d, pruned, 4)
        done = [x for x in operations(plan, block) if x.name == layer.name]
        # To be measured, and to move on.
        assert [x.cost.flops for x in done] == 2 * [2 * tokens * 4 * rows * d]
    grams = Counter(x.cost.flops for x in operations(plan, block) if x.name == "gram_accumulate")
    for _, d in sizes.values():
        assert grams[tokens * pruned * d * (d + 1)] == 1
