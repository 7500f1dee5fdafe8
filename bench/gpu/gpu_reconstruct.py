"""Step 2, first: steps of a reconstruction on a block of Llama-3-70B's, Llama-3.1-8B's and a mixture's sizes.

A step is a micro-batch's forward and backward, and Adam on the kept weights of all layers: most of a default run.
"""

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_lines import Part
from gpu_runs import LLAMA, SEQLEN, SIZES, TINY_SEQLEN, TINY_SIZES
from gpu_trace import summary
from timing import GPU, Moment
from torch import Tensor

from sparsefw import memory
from sparsefw.driver.reconstruct import RATE, BlockFit
from sparsefw.model.activations import split_batches
from sparsefw.model.block_model import BlockModel, resident
from sparsefw.model.forward import embed
from sparsefw.ranks import ALONE
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.kept_weights import KeptWeights

DEVICE = memory.this_device()
# Sizes by transformers' model_type: Qwen3-30B-A3B is the mixture.
MIXTURE = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
MIXTURE |= {"num_experts_per_tok": 8, "num_attention_heads": 32, "head_dim": 128, "num_key_value_heads": 4}
BLOCKS = {"70B": ("llama", SIZES["70B"]), "8B": ("llama", SIZES["8B"]), "mixture": ("qwen3_moe", MIXTURE)}
TINY_MIXTURE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
# Windows of a micro-batch, steps that are timed, and steps that are made twice.
BATCHES, STEPS, REPEATED = (1, 2, 4), 20, 5
SPARSITY = 0.6


def steps(part: Part) -> None:
    """Times, waits of the host, memory, kernels and bits of steps, for each model and size of a micro-batch."""
    for name, (family, sizes) in BLOCKS.items():
        small = TINY_SIZES | (TINY_MIXTURE if name == "mixture" else {})
        with _block(family, LLAMA | (small if part.tiny else sizes) | {"num_hidden_layers": 2}) as model:
            for batch in BATCHES[:1] if part.tiny else BATCHES:
                fit, matrices = _fit(model, batch, TINY_SEQLEN if part.tiny else SEQLEN)
                part.add(model=name, windows=batch, **_timed(fit, matrices, 2 if part.tiny else STEPS))
            part.add(model=name, **_watched(fit, matrices, part.scratch / f"{name}-step.json"))
            part.add(model=name, differs=_differing(fit, matrices), repeated=REPEATED)


@contextmanager
def _block(family: str, sizes: dict[str, int]) -> Iterator[BlockModel]:
    """A random model, of which block 0 is open and pruned at random, as many weights of each row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.bfloat16)
    with resident(model, None, DEVICE) as opened:
        yield opened


def _fit(model: BlockModel, batch: int, seqlen: int) -> tuple[BlockFit, list[tuple[torch.nn.Parameter, list[Tensor]]]]:
    """A fit of block 0 to what it put out before it was pruned, and its matrices."""
    ids = torch.randint(LLAMA["vocab_size"], (batch * (STEPS + 4), seqlen), generator=torch.Generator().manual_seed(0))
    states = embed(model, ids, batch)
    model.close(0)
    block, dense = model.open(0), states.fork()
    with torch.no_grad():
        dense.advance(0)
    large = [p for p in block.parameters() if p.ndim > 1]
    for p in large:
        p.data *= torch.rand_like(p, dtype=torch.float32) >= SPARSITY
    run: Any = SimpleNamespace(model=model, config=PruneConfig(kernel="triton"), ranks=ALONE, rounded=False)
    matrices = [(p, list(p.data.unbind()) if p.ndim == 3 else [p.data]) for p in large]
    return BlockFit(run, 0, states, dense, *split_batches(len(states))), matrices


def _timed(fit: BlockFit, matrices: list, count: int) -> dict[str, Any]:
    """Medians of a step's halves in milliseconds, and the most memory."""
    weights, moments = KeptWeights(matrices, count, RATE, fit.run.config.backend), []
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    for step in range(count):
        moments.append([_now()])
        fit.add_gradients(step % len(fit.learned), 0, weights.parameters)
        weights.gradients()
        moments[-1].append(_now())
        weights.step()
        moments[-1].append(_now())
    weights.close()
    halves = [[1e3 * (after - before) for before, after in pairwise(row)] for row in moments[1:]]
    gradients_ms, adam_ms = map(statistics.median, zip(*halves, strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else None
    return {"gradients_ms": gradients_ms, "adam_ms": adam_ms, "peak_gib": peak, "varies": fit.varies}


def _now() -> Any:
    return Moment() if GPU else time.perf_counter()


def _watched(fit: BlockFit, matrices: list, trace: Path) -> dict[str, Any]:
    """Where the host waits for the GPU in a step, and the longest kernels of one."""
    weights = KeptWeights(matrices, 2, RATE, fit.run.config.backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
        _step(fit, weights, 0)
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
    activity = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiled:
        _step(fit, weights, 1)
        if GPU:
            torch.cuda.synchronize()
    weights.close()
    profiled.export_chrome_trace(str(trace))
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"waits": len(waits), "where": sorted(set(waits))[:12], **summary(trace)}


def _step(fit: BlockFit, weights: KeptWeights, n: int) -> None:
    fit.add_gradients(n, 0, weights.parameters)
    weights.gradients()
    weights.step()


def _differing(fit: BlockFit, matrices: list) -> int:
    """How many matrices have other bits when the same steps are made again from the same weights."""
    results = []
    for _ in range(2):
        weights = KeptWeights(matrices, REPEATED, RATE, fit.run.config.backend)
        for n in range(REPEATED):
            _step(fit, weights, n)
        results.append([p.detach().clone() for p, _ in matrices])
        weights.put_back()
        weights.close()
    return sum(not torch.equal(a, b) for a, b in zip(*results, strict=True))
