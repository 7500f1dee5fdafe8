"""Steps 4 and 5: whole runs of `sparsefw.run` on random checkpoints of Llama's sizes, made here."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_lines import Part
from gpu_trace import summary
from kill_runs import outputs

GPU = torch.cuda.is_available()

_LLAMA = {"vocab_size": 2048, "num_key_value_heads": 8, "max_position_embeddings": 2048}
_TINY = {"vocab_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
# Sizes of the checkpoints, full and tiny. A run needs one block at a time, so one of 80, or 3 of 32, tell the rest.
# Random weights are reconstructed in up to four times the steps of others: more blocks would not end in time.
SIZES = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 1},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 3},
}
TINY_SIZES = {
    "70B": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    "8B": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}
# Calibration windows, and tokens in a window.
WINDOWS, TINY_WINDOWS = (256, 2048), (4, 32)
TINY_FLAGS = ["--steps", 1, "--refit", 1, "--rounds", 0]

# Limits of GPU memory with which the activations of a 70B block stay on a card of 80 GiB, and with which they move to
# host memory; of a run on a small card. By itself a run leaves a tenth of the card to others.
GPU_PLACED, HOST_PLACED, SMALL = 75, 24, 16


def checkpoint(part: Part, name: str) -> Path:
    """A random checkpoint of SIZES, made once."""
    folder = part.scratch / f"{name}{'-tiny' * part.tiny}"
    if not (folder / "config.json").exists():
        # Imports transformers, which takes seconds.
        from random_checkpoint import generate

        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        sizes = _TINY | TINY_SIZES[name] if part.tiny else _LLAMA | SIZES[name]
        generate(folder, "llama", device="cuda" if GPU else "cpu", **sizes)
        part.add(checkpoint=name, made_s=round(time.perf_counter() - started, 1), sizes=sizes)
    return folder


def text(part: Part) -> Path:
    """A text that is long enough for all windows, made once."""
    path, words = part.scratch / "text.txt", random.Random(0)
    if not path.exists():
        letters = "etaoinshrdlu"
        vocabulary = ["".join(words.choices(letters, k=words.randint(1, 9))) for _ in range(5000)]
        lines = (" ".join(words.choices(vocabulary, k=12)) for _ in range(1000 if part.tiny else 100_000))
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


def flags(part: Part, name: str, output: str, *more: str) -> list[str]:
    """The flags of a run of a checkpoint. `more` comes last, and may change the windows."""
    windows, seqlen = TINY_WINDOWS if part.tiny else WINDOWS
    places = ["--model", checkpoint(part, name), "--dataset", text(part), "--output", part.scratch / output]
    sizes = ["--nsamples", windows, "--seqlen", seqlen, *(TINY_FLAGS if part.tiny else [])]
    return [*map(str, [*places, *sizes]), "--overwrite", *more]


def told(output: Path) -> dict[str, Any]:
    """The time and the memory of a run, from its report."""
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    layers = report["layers"]
    return {
        "seconds": report["seconds"],
        "block_seconds": [block["seconds"] for block in report["blocks"]],
        "peak_memory": report["peak_memory"],
        "memory": report["memory"],
        "relative_error": sum(layer["relative_error"] for layer in layers) / len(layers),
    }


def run_and_tell(part: Part, arguments: Sequence[str], output: str, environment: dict[str, str] | None = None) -> float:
    """Run `sparsefw.run` in a process of its own, and add a line; returns its seconds.

    Raises:
        RuntimeError: the run failed.
    """
    started = time.perf_counter()
    done = subprocess.run(command(arguments), env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - started
    if done.returncode:
        part.add(run=output, failed=done.stderr.splitlines()[-5:])
        raise RuntimeError(f"{output}: status {done.returncode}")
    part.add(run=output, process_s=took, **told(part.scratch / output))
    return took


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of a run."""
    return [sys.executable, "-m", "sparsefw.run", *arguments]


def block_compiled(part: Part) -> None:
    """A 70B block on few windows: afterwards all of its kernels are compiled."""
    few = ["--nsamples", "2" if part.tiny else "8"]
    run_and_tell(part, flags(part, "70B", "70B-compiled", *few), "70B-compiled")


def block_on_the_gpu(part: Part) -> None:
    """A 70B block by the default config, its activations on the GPU, under the profiler."""
    _profiled(part, "70B-gpu", *(["--gpu-memory", str(GPU_PLACED)] if GPU else []))


def block_in_host_memory(part: Part) -> None:
    """The same with activations in host memory."""
    _profiled(part, "70B-host", *(["--gpu-memory", str(HOST_PLACED)] if GPU else []))


def _profiled(part: Part, output: str, *more: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    from sparsefw import run

    arguments, trace = flags(part, "70B", output, *more), part.scratch / f"{output}-trace.json"
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        status = run.main(arguments)
        took = time.perf_counter() - started
        if status:
            raise SystemExit(status)
        # Before the profiler ends and the trace is read, which take a while.
        part.add(run=output, run_s=took, **told(part.scratch / output))
    if GPU and hasattr(torch.cuda, "host_memory_stats"):
        part.add(page_locked={name: n for name, n in torch.cuda.host_memory_stats().items() if "bytes" in name})
    profiled.export_chrome_trace(str(trace))
    part.add(run=output, **summary(trace))


def _cached(part: Part) -> dict[str, str]:
    """An environment in which kernels are compiled into a cache of their own."""
    return os.environ | {"TRITON_CACHE_DIR": str(part.scratch / "cache-8B")}


def cold(part: Part) -> None:
    """3 of 32 blocks with no kernel compiled before."""
    shutil.rmtree(part.scratch / "cache-8B", ignore_errors=True)
    run_and_tell(part, flags(part, "8B", "8B-cold"), "8B-cold", _cached(part))


def warm(part: Part) -> None:
    """The same with all kernels compiled; the bytes must be those of the cold run."""
    run_and_tell(part, flags(part, "8B", "8B-warm"), "8B-warm", _cached(part))
    part.add(same_bytes_as_cold=same_bytes(part, "8B-warm", "8B-cold"))


def within(part: Part) -> None:
    """The same within the memory of a small card and a small host."""
    limits = ["--gpu-memory", str(SMALL), "--host-memory", str(SMALL)] if GPU else ["--host-memory", str(SMALL)]
    run_and_tell(part, flags(part, "8B", "8B-within", *limits), "8B-within", _cached(part))
    # Other chunks of rows may round otherwise: worth knowing, not an error.
    part.add(same_bytes_as_warm=same_bytes(part, "8B-within", "8B-warm"))


def killed(part: Part) -> None:
    """The same, killed after a block and started again; the bytes must be those of the undisturbed run."""
    arguments, output = flags(part, "8B", "8B-killed"), part.scratch / "8B-killed"
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(command([*arguments, "--restart"]), env=_cached(part), stdout=subprocess.DEVNULL)
    records = output.with_name(f".{output.name}.partial") / "records"
    while process.poll() is None and not list(records.glob("*.json")):
        time.sleep(0.02)
    process.kill()
    part.add(killed=process.wait() == -signal.SIGKILL, finished=len(list(records.glob("*.json"))))
    run_and_tell(part, arguments, "8B-killed", _cached(part))
    part.add(same_bytes_as_warm=same_bytes(part, "8B-killed", "8B-warm"))


def same_bytes(part: Part, *names: str) -> bool | None:
    """Whether two outputs have the same bytes; None if one of them is not there."""
    folders = [part.scratch / name for name in names]
    if not all(folder.exists() for folder in folders):
        return None
    one, other = map(outputs, folders)
    return one == other
