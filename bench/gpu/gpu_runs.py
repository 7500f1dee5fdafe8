"""Run `sparsefw` on a GPU with random checkpoints of the sizes of large models, which are made here."""

import json
import os
import random
import shutil
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu import TINY_FLAGS, Part, python
from kill_runs import outputs

GPU = torch.cuda.is_available()
# Places and kernels that are listed.
LISTED = 25

LLAMA = {"vocab_size": 2048, "num_key_value_heads": 8, "max_position_embeddings": 2048}
# Family and sizes of the checkpoints. A run needs one block at a time, so one of 80 tells the rest. The last block is
# fitted to predictions, which takes longer, and runs leave it out.
SIZES = {
    "8B": ("llama", dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=3)),
    "70B": ("llama", dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=2)),
    "mixture": ("qwen3_moe", dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, num_attention_heads=32, head_dim=128, num_hidden_layers=2)),
}  # fmt: skip
# A model without experts ignores their sizes.
TINY = dict(hidden_size=32, intermediate_size=48, num_attention_heads=8, head_dim=8)
TINY |= dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
ONE_BLOCK, TWO_BLOCKS = r"re:model\.layers\.0\.", r"re:model\.layers\.[01]\."
# The parts that are a run: the checkpoint, layers, calibration windows, and memory limits of GPU and host in GiB.
# At 75 GiB the activations of a 70B block stay on a GPU of 80 GiB, at 24 GiB they move to the host.
RUNS = {
    "8B block": dict(model="8B"),
    "8B cold": dict(model="8B", blocks=TWO_BLOCKS),
    "8B warm": dict(model="8B", blocks=TWO_BLOCKS),
    "8B within 16 GiB": dict(model="8B", blocks=TWO_BLOCKS, gpu=16, host=16),
    "70B block": dict(model="70B", windows=256, gpu=75),
    "70B in host memory": dict(model="70B", windows=256, gpu=24),
    "mixture block": dict(model="mixture"),
    "8B profiled": dict(model="8B", windows=8),
}
# The earlier part whose output should have the same bytes. Other chunks of rows or micro-batches may round otherwise.
SAME_AS = {"8B warm": "8B cold", "8B within 16 GiB": "8B cold", "70B in host memory": "70B block"}


def checkpoint(part: Part, name: str) -> Path:
    """Make a random checkpoint of SIZES, once."""
    folder = part.scratch / f"{name}{'-tiny' * part.tiny}"
    if not (folder / "tokenizer.json").exists():
        # Imports transformers, which takes seconds.
        from random_checkpoint import generate

        shutil.rmtree(folder, ignore_errors=True)
        family, sizes = SIZES[name]
        if part.tiny:
            sizes = sizes | TINY
        # A CPU may compute bf16 in another dtype from run to run.
        dtype = torch.float32 if part.tiny else torch.bfloat16
        generate(folder, family, "cuda" if GPU else "cpu", dtype, **LLAMA | sizes)
        # The memory is the run's, in a process of its own.
        torch.cuda.empty_cache()
    return folder


def flags(part: Part, model: str, blocks: str = ONE_BLOCK, windows: int = 64, gpu: int = 0, host: int = 0) -> list[str]:
    """Make the flags of a run. It calibrates on a text of random numbers."""
    text, drawn = part.scratch / "text.txt", random.Random(0)
    if not text.exists():
        text.write_text(" ".join(str(drawn.randrange(10**6)) for _ in range(250_000)))
    places = ["--model", checkpoint(part, model), "--dataset", text, "--output", output_of(part), "--overwrite"]
    sizes = TINY_FLAGS if part.tiny else ["--nsamples", windows, "--seqlen", 2048]
    limits = ["--gpu-memory", gpu] * bool(GPU and gpu) + ["--host-memory", host] * bool(host)
    return [*map(str, [*places, *sizes, *limits]), "--include", blocks]


def output_of(part: Part) -> Path:
    """Name the output folder of a part."""
    return part.scratch / part.path("").name


def figures(output: Path) -> dict[str, Any]:
    """Read the times and the memory of a run from its report."""
    report = json.loads((output / "report.json").read_text("utf-8"))
    steps = [block["reconstruction"] and block["reconstruction"]["steps"] for block in report["blocks"]]
    errors = [layer["relative_error"] for layer in report["layers"]]
    return {
        "seconds": report["seconds"],
        "ways": sorted({block["way"] for block in report["blocks"]}),
        "steps_of_reconstructions": steps,
        "measured": report["peak_memory"],
        "planned": report["memory"]["expected"],
        "error": sum(errors) / len(errors),
    }


def prune(part: Part) -> None:
    """Prune in a process of its own, and add a line of figures.

    Raises:
        SystemExit: the run failed.
    """
    python("-m", "sparsefw.run", *flags(part, **RUNS[part.name]))
    found = figures(output_of(part))
    if same_as := SAME_AS.get(part.name):
        other = output_of(replace(part, name=same_as))
        if other.exists():
            found[f"same bytes as {same_as}"] = outputs(output_of(part)) == outputs(other)
    part.add(**found)


def prune_cold(part: Part) -> None:
    """Prune after the cache of compiled kernels has been removed."""
    shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
    prune(part)


def profile(part: Part) -> None:
    """Prune under the profiler, and add where the host waits, the share of time in kernels, and the longest kernels.

    The trace, for Perfetto or chrome://tracing, stays in the scratch folder.
    """
    import sparsefw.run
    from sparsefw.environment import set_environment

    # Before the checkpoint is made on the GPU.
    set_environment()
    activity = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, torch.profiler.profile(activities=[activity]) as profiled:
        warnings.simplefilter("always")
        if GPU:
            torch.cuda.set_sync_debug_mode("warn")
        if status := sparsefw.run.main(flags(part, **RUNS[part.name])):
            raise SystemExit(status)
    took = time.perf_counter() - started
    part.add(**figures(output_of(part)))
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    part.add(waits_of_the_host=dict(waits.most_common(LISTED)))
    seconds = Counter({event.key: event.self_device_time_total / 1e6 for event in profiled.key_averages()})
    # Copies run at the same time as kernels.
    kernels = sum(s for name, s in seconds.items() if not name.startswith("Mem"))
    part.add(share_of_kernels=kernels / took, longest_kernels_and_copies_s=dict(seconds.most_common(LISTED)))
    profiled.export_chrome_trace(str(part.scratch / "trace.json"))
