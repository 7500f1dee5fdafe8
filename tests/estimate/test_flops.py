"""Estimates: what is counted is what a run does, on the device and on the disk; seconds at given rates."""

import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.families import save_model
from helpers.layer_inputs import make_gram, make_layers
from torch.overrides import TorchFunctionMode

from sparsefw import checkpoint
from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.windows import Windows
from sparsefw.driver.loop import prune_model
from sparsefw.estimate import rates, totals
from sparsefw.estimate.describe import describe
from sparsefw.estimate.flops import Operation, calls, passes
from sparsefw.estimate.memory import Work, disk_space
from sparsefw.estimate.rates import Rates
from sparsefw.estimate.totals import Job
from sparsefw.kernels import cpu
from sparsefw.kernels.cost import Cost
from sparsefw.model.placement import Placement
from sparsefw.model.streamed import StreamedModel
from sparsefw.run import parse_arguments, settings_of
from sparsefw.solver.layer import prune_layers
from sparsefw.solver.methods import METHODS

KERNELS = ("product", "row_step", "lmo", "row_swaps", "conjugate_step", "gram_accumulate", "cross_accumulate")
BATCH, SEQLEN = 2, 16


def counting() -> tuple[SimpleNamespace, Counter]:
    """The operations in torch, and how often each was called; flops of products under "flops"."""
    seen = Counter()

    def counted(name):
        def call(*args, **kwargs):
            seen[name] += 1
            if name == "product":
                rows, d = args[0].shape
                seen["flops"] += 2 * rows * d * d
            return getattr(cpu, name)(*args, **kwargs)

        return call

    return SimpleNamespace(**(vars(cpu) | {name: counted(name) for name in KERNELS})), seen


def settings(*flags):
    return settings_of(parse_arguments(["--model", "any", "--kernel", "torch", "--precision", "ieee", *flags]))


@pytest.mark.parametrize(
    "flags",
    ["", "--refit 0", "--refit 0 --target dense", "--preset paper --steps 9", "--rounds 0", "--steps 0", "--steps 1",
     "--alpha 0.5", "--target layer", "--sparsity 2:4", "--swaps 5", "--steps 7 --refit 2 --rounds 1", "--damp 0",
     "--method wanda", "--method ria", "--method magnitude", "--method sparsegpt"],
)  # fmt: skip
def test_calls_of_a_solve_are_those_that_are_made(flags):
    how, method = settings(*flags.split()), "sparsefw"
    if "--method" in flags:
        method = flags.split()[-1]
    follows = how.target == "dense" and method == "sparsefw"
    ops, seen = counting()
    layers = make_layers((40, 24))
    crosses = [torch.ones(n, 96) for n in (40, 24)] if follows else None
    solves = 1 if METHODS[method].by_rows else len(layers)
    list(prune_layers(layers, make_gram(), method, how, ops, crosses=crosses))
    expected = calls(method, how, follows)
    assert seen["product"] == solves * expected.products
    assert seen["row_step"] == solves * expected.row_steps
    assert seen["lmo"] == solves * expected.lmos
    assert seen["row_swaps"] == solves * expected.row_swaps
    assert seen["conjugate_step"] == solves * sum(count * (steps + 1) for count, steps, _ in expected.descents)


def test_what_the_readme_says_of_products():
    default, masks = calls("sparsefw", settings(), True), calls("sparsefw", settings("--refit", "0"), False)
    assert (default.steps, default.target, default.products) == (40, 4, 40 + 4 + 25 + 5)
    assert (masks.steps, masks.products) == (40, 44)


class Products(TorchFunctionMode):
    """Sums the flops of linear layers and of products with slices of stacked weights; routers left out."""

    def __init__(self, routers):
        super().__init__()
        self.flops, self.routers = 0, routers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[1].shape[0] not in self.routers:
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        return func(*args, **(kwargs or {}))


def planned(source, methods, how, windows, held_out=(), place="gpu"):
    described = describe(str(source))
    work = Work(windows, held_out, SEQLEN, methods, how, False, 1)
    return Job(described.shape, described.traits, work, Placement(BATCH, place))


def prune(source, job, tmp_path, monkeypatch):
    """Run a job with everything counted."""
    ops, seen = counting()

    def read(tensors, pin=False):
        seen["read"] += sum(tensor.nbytes for tensor in tensors.values())
        return read_tensors(tensors, pin)

    output, save = StreamedModel.output, Writer._save

    def counted_output(self, *args, **kwargs):
        seen["outputs"] += 1
        return output(self, *args, **kwargs)

    def counted_save(self, path, tensors):
        seen["write"] += sum(tensor.nbytes for tensor in tensors.values())
        save(self, path, tensors)

    monkeypatch.setattr(StreamedModel, "output", counted_output)
    monkeypatch.setattr(Writer, "_save", counted_save)
    model = StreamedModel(checkpoint.inspect(source), torch.device("cpu"), read)

    def windows(n):
        generator = torch.Generator().manual_seed(n)
        return Windows(torch.randint(2, 250, (n, SEQLEN), generator=generator), f"text {n}", "")

    held_out = [windows(n) for n in job.work.held_out]
    products = Products({4})
    with products, Writer(tmp_path / "out", len(model.blocks) + 1) as writer:
        prune_model(
            model,
            windows(job.work.windows),
            held_out,
            list(job.work.methods),
            job.work.settings,
            ops,
            writer,
            placement=replace(job.placement, folder=tmp_path),
        )
        writer.finish(source)
    return seen, products.flops


@pytest.mark.parametrize(
    ("family", "methods", "flags"),
    [
        ("llama", "sparsefw", ""),
        ("llama", "wanda sparsegpt sparsefw", ""),
        ("llama", "sparsefw", "--refit 0"),
        ("llama", "magnitude", "--method magnitude"),
        ("gpt_neox", "sparsefw", ""),
        ("mixtral", "sparsefw", ""),
        ("qwen2_moe", "wanda sparsefw", ""),
    ],
)
def test_a_run_does_what_is_counted(family, methods, flags, tmp_path, monkeypatch, set_threads):
    set_threads(1)
    source = save_model(tmp_path / "model", family, num_hidden_layers=2)
    how = settings(*flags.split(), *(["--steps", "4"] if "sparsefw" in methods else []))
    # An odd number of windows, so that one micro-batch is smaller than the others.
    job = planned(source, tuple(methods.split()), how, 7, (3, 4))
    seen, flops = prune(source, job, tmp_path, monkeypatch)
    blocks = job.shape.blocks
    runs = [one for block in blocks for one in passes(block, job.work, job.placement)]
    assert seen["outputs"] == sum(-(-one.windows // BATCH) for one in runs)
    done = [one for block in blocks for one in job.of_block(block)]
    layers = {layer.name for block in blocks for layer in block.layers}
    forward = sum(one.cost.flops for one in done if one.name in layers)
    forward += sum(one.cost.flops for one in totals.head(job.shape, job.work))
    # The first block is run on one micro-batch to ask it for the form of its output.
    once = [one for one in job.of_block(blocks[0]) if one.phase == "forward" and one.name in layers]
    asked = sum(one.cost.flops for one in once) * BATCH // (job.work.windows * len(job.work.methods))
    by_name = Counter()
    for one in done:
        by_name[one.name] += one.calls
    made = sum(one.calls for one in done if one.name in {"target", "start", "step", "refit", "error"})
    if family in ("llama", "gpt_neox"):
        assert flops == forward + asked
        assert seen["product"] == made
        assert {name: seen[name] for name in KERNELS[1:]} == {name: by_name[name] for name in KERNELS[1:]}
        solved = {"target", "start", "step", "refit", "error"}
        assert seen["flops"] == sum(one.cost.flops for one in done if one.name in solved)
    else:
        # Experts take turns, and one may see no token of a micro-batch.
        assert flops == pytest.approx(forward + asked, rel=0.02)
        assert 0.8 * made <= seen["product"] <= made
        assert 0.8 * by_name["gram_accumulate"] <= seen["gram_accumulate"] <= by_name["gram_accumulate"]
        assert seen["cross_accumulate"] == by_name["cross_accumulate"]
    traffic = totals.disk_traffic(job)
    assert (seen["read"], seen["write"]) == (traffic["read"], traffic["write"])
    index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    assert disk_space(job.shape, job.work, job.placement)["output"] == index["metadata"]["total_size"]


class TestSeconds:
    """Of a job with numbers that can be followed."""

    @pytest.fixture
    def job(self, tmp_path):
        return planned(
            save_model(tmp_path / "model", "llama"), ("wanda", "sparsefw"), settings("--steps", "3"), 6, (2,)
        )

    @pytest.mark.parametrize("ahead", [True, False])
    def test_nothing_but_the_disk(self, job, ahead):
        job = replace(job, placement=replace(job.placement, ahead=ahead))
        speed = Rates(dict.fromkeys(rates.UNITS, math.inf), math.inf, 7.0, "")
        traffic = totals.disk_traffic(job)
        assert totals.seconds(job, speed) == pytest.approx((traffic["read"] + traffic["write"]) / 7)

    def test_nothing_but_the_work(self, job):
        speed = Rates(dict.fromkeys(rates.UNITS, 1e3), math.inf, None, "")
        flops = totals.phases(job)["all"]["run"]["flops"]
        assert totals.seconds(job, speed) == pytest.approx(flops / 1e3)
        by_phase = totals.phase_seconds(job, speed)
        assert sum(by_phase.values()) == pytest.approx(flops / 1e3)
        assert by_phase["solve"] == pytest.approx(totals.phases(job)["solve"]["run"]["flops"] / 1e3)

    def test_the_disk_beside_the_work(self, job):
        """Where blocks are read ahead, work hides all but the first read and the last write, and what is outside."""
        slow = Rates(dict.fromkeys(rates.UNITS, 1.0), math.inf, 1e6, "")
        apart = replace(job, placement=replace(job.placement, ahead=False))
        sizes = [block.nbytes for block in job.shape.blocks]
        hidden = sum(sizes[1:]) + 2 * sum(sizes[:-1])
        difference = totals.seconds(apart, slow) - totals.seconds(job, slow)
        assert difference == pytest.approx(hidden / 1e6, rel=1e-3)

    def test_the_larger_of_flops_and_bytes(self):
        speed = Rates({"bf16": 10.0}, 100.0, None, "")
        one, two = (Operation("solve", "any", "bf16", 1, Cost(*of)) for of in ((50, 100), (10, 1000)))
        assert rates.seconds([one, two], speed) == 5 + 10

    def test_activations_in_a_file(self, tmp_path):
        """Every pass reads them once, those that move a stream on write them; and they wait for the disk."""
        source = save_model(tmp_path / "model", "llama")
        job = planned(source, ("sparsefw",), settings("--refit", "0"), 6, place="file")
        size = 6 * SEQLEN * 32 * 4
        assert disk_space(job.shape, job.work, job.placement)["activations"] == size
        traffic = totals.disk_traffic(job)
        assert (traffic["calibrate"], traffic["forward"]) == (3 * size, 3 * 2 * size)
        speed = Rates(dict.fromkeys(rates.UNITS, math.inf), math.inf, 1.0, "")
        assert totals.seconds(job, speed) == pytest.approx(traffic.total())
