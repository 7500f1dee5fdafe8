"""Steps 2, 4 and 5: whole runs of `sparsefw.run` on random checkpoints of Llama's sizes, made here."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_lines import Part
from gpu_trace import summary
from kill_runs import outputs

from sparsefw import memory

GPU = torch.cuda.is_available()
RUN = [sys.executable, "-m", "sparsefw.run"]

LLAMA = {"vocab_size": 2048, "num_key_value_heads": 8, "max_position_embeddings": 2048}
# Sizes of the checkpoints. A run needs one block at a time, so one of 80, or 2 of 32, tell the rest. The last one is
# fitted to predictions, in twice the steps, and random weights in up to four rounds: the runs leave it out.
SIZES = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 2},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 3},
}
SIZES["8B block"] = SIZES["8B"] | {"num_hidden_layers": 2}
TINY_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_hidden_layers": 2}
# The layers that a run prunes, and its calibration windows.
PRUNED = {"70B": (r"re:model\.layers\.0\.", 256), "8B": (r"re:model\.layers\.[01]\.", 64)}
PRUNED["8B block"] = (PRUNED["70B"][0], 64)
TINY_WINDOWS, SEQLEN, TINY_SEQLEN = 4, 2048, 32
TINY_FLAGS = ["--steps", 1, "--refit", 1, "--rounds", 0]

# Limits of GPU memory with which the activations of a 70B block stay on a card of 80 GiB, and with which they move to
# host memory; of a run on a small card. By itself a run leaves a tenth of the card to others.
GPU_PLACED, HOST_PLACED, SMALL = 75, 24, 16


def checkpoint(part: Part, name: str) -> Path:
    """A random checkpoint of SIZES, made once."""
    folder = part.scratch / f"{name}{'-tiny' * part.tiny}"
    if not (folder / "tokenizer.json").exists():
        # Imports transformers, which takes seconds.
        from random_checkpoint import generate

        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        sizes = LLAMA | (TINY_SIZES if part.tiny else SIZES[name])
        generate(folder, "llama", device="cuda" if GPU else "cpu", **sizes)
        part.add(checkpoint=name, made_s=round(time.perf_counter() - started, 1), sizes=sizes)
    return folder


def text(part: Part) -> Path:
    """A text that is long enough for all windows, made once."""
    path, drawn = part.scratch / "text.txt", random.Random(0)
    if not path.exists():
        numbers = (drawn.randrange(10**6) for _ in range(2000 if part.tiny else 250_000))
        path.write_text(" ".join(map(str, numbers)))
    return path


def flags(part: Part, name: str, output: str, *more: str) -> list[str]:
    """The flags of a run of a checkpoint. `more` comes last, and may change the windows."""
    (layers, windows), seqlen = PRUNED[name], TINY_SEQLEN if part.tiny else SEQLEN
    places = ["--model", checkpoint(part, name), "--dataset", text(part), "--output", part.scratch / output]
    sizes = ["--nsamples", TINY_WINDOWS if part.tiny else windows, "--seqlen", seqlen, "--include", layers]
    sizes += TINY_FLAGS if part.tiny else []
    return [*map(str, [*places, *sizes]), "--overwrite", *more]


def run_report(output: Path) -> dict[str, Any]:
    """The time and the memory of a run, from its report."""
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    errors = [layer["relative_error"] for layer in report["layers"]]
    kept = {name: report[name] for name in ("seconds", "peak_memory", "memory")}
    blocks = [{name: block[name] for name in ("seconds", "way", "reconstruction")} for block in report["blocks"]]
    return kept | {"blocks": blocks, "relative_error": sum(errors) / len(errors)}


def run(part: Part, name: str, output: str, *more: str, same_as: str = "", cached: bool = True) -> None:
    """Run `sparsefw.run` on a checkpoint in a process of its own, and add a line.

    Args:
        part: receives the line.
        name: the checkpoint.
        output: name of the output.
        more: further flags.
        same_as: an earlier output; the line says whether both have the same bytes.
        cached: whether kernels are compiled into a cache of their own.

    Raises:
        RuntimeError: the run failed.
    """
    arguments, started = flags(part, name, output, *more), time.perf_counter()
    status, errors = launch(arguments, environment(part) if cached else None)
    if status:
        part.add(run=output, failed=errors.splitlines()[-5:])
        raise RuntimeError(f"{output}: status {status}")
    part.add(run=output, process_s=time.perf_counter() - started, **run_report(part.scratch / output))
    if same_as and (part.scratch / same_as).exists():
        one, other = (outputs(part.scratch / folder) for folder in (output, same_as))
        part.add(**{f"same_bytes_as_{same_as}": one == other})


def launch(arguments: list[str], environment: dict[str, str] | None) -> tuple[int, str]:
    """Run `sparsefw.run` in a process of its own; returns its status and its errors."""
    done = subprocess.run([*RUN, *arguments], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def environment(part: Part) -> dict[str, str]:
    """An environment in which kernels are compiled into a cache of their own."""
    return os.environ | {"TRITON_CACHE_DIR": str(part.scratch / "cache-8B")}


def block_compiled(part: Part) -> None:
    """A 70B block on few windows: afterwards all of its kernels are compiled."""
    run(part, "70B", "70B-compiled", "--nsamples", "2" if part.tiny else "8", cached=False)


def block_on_the_gpu(part: Part) -> None:
    """A 70B block by the default config, its activations on the GPU."""
    run(part, "70B", "70B-gpu", *(["--gpu-memory", str(GPU_PLACED)] if GPU else []), cached=False)


def block_in_host_memory(part: Part) -> None:
    """The same with activations in host memory; other micro-batches may round otherwise."""
    limits = ["--gpu-memory", str(HOST_PLACED)] if GPU else []
    run(part, "70B", "70B-host", *limits, same_as="70B-gpu", cached=False)


def block_profiled(part: Part) -> None:
    """A 70B block without a reconstruction, under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    import sparsefw.run

    output, trace = "70B-profiled", part.scratch / "70B-profiled-trace.json"
    arguments = flags(part, "70B", output, "--reconstruct", "0")
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        status = sparsefw.run.main(arguments)
        took = time.perf_counter() - started
        if status:
            raise SystemExit(status)
        # Before the profiler ends and the trace is read, which take a while.
        part.add(run=output, run_s=took, **run_report(part.scratch / output))
    if GPU and hasattr(torch.cuda, "host_memory_stats"):
        part.add(pinned={name: n for name, n in torch.cuda.host_memory_stats().items() if "bytes" in name})
    profiled.export_chrome_trace(str(trace))
    part.add(run=output, **summary(trace))


def recovered(part: Part) -> None:
    """8B blocks fitted together, twice: seconds and memory, and whether both have the same bytes."""
    import sparsefw.recover

    pruned, windows = part.scratch / "8B-masks", ["--nsamples", 32, "--seqlen", TINY_SEQLEN if part.tiny else 512]
    status, errors = launch(flags(part, "8B", pruned.name, "--nsamples", "4", "--reconstruct", "0"), None)
    if status:
        raise RuntimeError(errors)
    ends = []
    for output in (part.scratch / "8B-recovered", part.scratch / "8B-again"):
        started = time.perf_counter()
        if status := sparsefw.recover.main([*map(str, [pruned, output, *windows]), "--overwrite"]):
            raise SystemExit(status)
        part.add(run=output.name, run_s=time.perf_counter() - started, peak_memory=memory.peak_memory())
        ends.append(outputs(output))
    part.add(same_bytes=ends[0] == ends[1])


def cold(part: Part) -> None:
    """2 of 32 blocks with no kernel compiled before."""
    shutil.rmtree(part.scratch / "cache-8B", ignore_errors=True)
    run(part, "8B", "8B-cold")


def warm(part: Part) -> None:
    """The same with all kernels compiled; the bytes must be those of the cold run."""
    run(part, "8B", "8B-warm", same_as="8B-cold")


def within(part: Part) -> None:
    """The same within the memory of a small card and a small host."""
    limits = ["--gpu-memory", str(SMALL)] * GPU + ["--host-memory", str(SMALL)]
    # Other chunks of rows may round otherwise: worth knowing, not an error.
    run(part, "8B", "8B-within", *limits, same_as="8B-warm")


def killed(part: Part) -> None:
    """The same, killed after a block and started again; the bytes must be those of the undisturbed run."""
    arguments, output = flags(part, "8B", "8B-killed", "--restart"), part.scratch / "8B-killed"
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen([*RUN, *arguments], env=environment(part), stdout=subprocess.DEVNULL)
    records = output.with_name(f".{output.name}.partial") / "records"
    while process.poll() is None and not list(records.glob("*.json")):
        time.sleep(0.02)
    process.kill()
    part.add(killed=process.wait() == -signal.SIGKILL, finished=len(list(records.glob("*.json"))))
    run(part, "8B", "8B-killed", same_as="8B-warm")
