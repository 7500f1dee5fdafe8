"""The expected memory is what a run takes, by the bytes of its tensors."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import random_checkpoint
from helpers.commands import TEXT, run
from helpers.families import first_is_fast
from torch.utils._pytree import tree_leaves

from sparsefw.driver import distill
from sparsefw.driver import prune as driver
from sparsefw.driver import run as driver_run
from sparsefw.estimate import memory
from sparsefw.estimate.live_bytes import LiveBytes
from sparsefw.estimate.memory import CODE_OF_EXPERTS, LIBRARIES, memory_needs
from sparsefw.solver import stack

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 1024}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 16}
# By name: family, and flags.
RUNS = {
    "default": ("llama", "--nsamples 8 --seqlen 64 --steps 1"),
    "refit 0": ("llama", "--nsamples 8 --seqlen 64 --steps 1 --refit 0"),
    "sparsegpt": ("llama", "--nsamples 8 --seqlen 64 --method sparsegpt"),
    "compare": ("llama", "--nsamples 8 --seqlen 64 --steps 1 --compare wanda"),
    "evaluation": ("llama", "--nsamples 8 --seqlen 64 --steps 1 --eval TEXT --eval-windows 4 --refit 0"),
    "long windows": ("llama", "--nsamples 4 --seqlen 512 --steps 1"),
    "reconstruct, long windows": ("llama", "--nsamples 4 --seqlen 512 --method wanda --reconstruct 1"),
    "reconstruct, pieces": ("llama", "--nsamples 32 --seqlen 128 --method wanda --reconstruct 1"),
    "mixture": ("qwen3_moe", "--nsamples 4 --seqlen 64 --method wanda --reconstruct 1"),
}


class Watched(LiveBytes):
    """Counts what other threads have made as well, such as weights, from its first use on, and nothing without data."""

    def add(self, storage):
        if storage.device.type != "meta":
            super().add(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if hasattr(x, "untyped_storage"):
                self.add(x.untyped_storage())
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    random_checkpoint.generate(folder / "llama", "llama", **SIZES)
    random_checkpoint.generate(folder / "qwen3_moe", "qwen3_moe", decoder_sparse_step=1, **SIZES, **EXPERTS)
    (folder / "text.txt").write_text(5 * TEXT)
    return folder


@pytest.mark.parametrize("name", first_is_fast(RUNS))
def test_a_run_takes_what_is_expected(name, models, out, monkeypatch):
    family, flags = RUNS[name]
    text, expected, watched = str(models / "text.txt"), [], Watched()
    # A reconstruction is watched by itself: a solve may be expected to take more.
    fits = "--reconstruct" in flags
    module, function = (driver, "reconstruct") if fits else (driver_run, "prune_model")
    place, work = driver_run.place, getattr(module, function)

    def placed(shape, workload, limits, folder=None, fixed=None):
        # Other threads hold no block that would go uncounted.
        placement = place(shape, workload, limits, folder, (fixed or {}) | {"ahead": False})
        if "pieces" in name:
            placement = replace(placement, batch=16, step=1)
        needs = memory_needs(shape, workload, placement)
        blocks = shape.blocks[0].nbytes
        phases = ["reconstruct"] if fits else needs.phases.keys() - {"texts"}
        peak = max(needs.phases[phase][1] for phase in phases)
        code = CODE_OF_EXPERTS if family == "qwen3_moe" and shape.itemsize == 2 else 0
        expected.append(peak - workload.process - LIBRARIES - code - blocks)
        return placement

    def counted(*args, **kwargs):
        with watched:
            return work(*args, **kwargs)

    # Modes are a thread's own: chunks are solved in this one.
    monkeypatch.setattr(stack, "ThreadPoolExecutor", lambda threads: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(driver_run, "place", placed)
    monkeypatch.setattr(module, function, counted)
    flags = [text if flag == "TEXT" else flag for flag in flags.split()]
    assert run(models / family, text, out, "--precision", "ieee", *flags) == 0
    # Small models are mostly what is bounded from above: the state of a solve, and a micro-batch.
    assert expected[-1] / 3 <= max(watched.points) <= expected[-1], (name, max(watched.points), expected[-1])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_recovery_takes_what_is_expected(family, models, out, monkeypatch):
    expected, watched, needed, fit = [], Watched(), memory.recovery_bytes, distill._fit

    def asked(*args):
        expected.append(needed(*args))
        return expected[-1]

    def counted(*args):
        with watched:
            return fit(*args)

    monkeypatch.setattr(memory, "recovery_bytes", asked)
    monkeypatch.setattr(distill, "_fit", counted)
    flags = ["--nsamples", "8", "--seqlen", "64", "--method", "magnitude", "--recover", "1024"]
    assert run(models / family, models / "text.txt", out, *flags) == 0
    assert expected[0] / 2 <= max(watched.points) <= expected[0], (max(watched.points), expected[0])
