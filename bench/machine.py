"""Describe this machine, and measure its roofs: how fast it copies, and how fast its library multiplies."""

import platform
import statistics
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import DEVICE, GPU, Stopwatch, race

REPO = Path(__file__).resolve().parents[1]
# Bytes that are copied, and rows of the square matrices that are multiplied.
COPIED, SIDE = (1 << 30, 8192) if GPU else (256 << 20, 2048)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Describe what times depend on."""
    # It reads an environment variable, which `timing` sets.
    import triton

    query = partial(_output, "nvidia-smi", "--format=csv,noheader", "--id=0")
    return dict(
        device=torch.cuda.get_device_name() if GPU else _cpu(),
        threads=torch.get_num_threads(),
        driver=query("--query-gpu=driver_version") if GPU else None,
        clocks=query("--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem") if GPU else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=_output("git", "describe", "--always", "--dirty"),
        capability="sm_{}{}".format(*torch.cuda.get_device_capability()) if GPU else None,
    )


def library_product(A: torch.Tensor, B: torch.Tensor, precision: str) -> torch.Tensor:
    """Multiply two matrices of one dtype by torch's library, with an fp32 result."""
    if A.dtype == torch.bfloat16:
        # On a CPU torch has no such product, and rounds the result to bf16.
        return torch.mm(A, B, out_dtype=torch.float32) if A.is_cuda else torch.mm(A, B)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        return torch.mm(A, B)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def roofs(limit: float = 1.0) -> dict[str, float]:
    """Measure bytes per second of a copy, and flops per second of the library's products by their precision.

    A CPU has no tf32; its bf16 counts only if it is faster than fp32.

    Args:
        limit: seconds for each.
    """
    source = torch.ones(COPIED, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    runs, work = {"copy": lambda: target.copy_(source)}, {"copy": 2 * COPIED}
    for precision in ("ieee", "bf16", *["tf32"] * GPU):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        A, B = (torch.randn(SIDE, SIDE, device=DEVICE).to(dtype) for _ in range(2))
        runs[precision], work[precision] = partial(library_product, A, B, precision), 2 * SIDE**3
    rates = {}
    for name, run in runs.items():
        run()
        watch = Stopwatch()
        times = race({name: lambda run=run, watch=watch: [watch(run)]}, limit)[name]
        rates[name] = work[name] / statistics.median(times)
    if not GPU and rates["bf16"] < rates["ieee"]:
        del rates["bf16"]
    return rates
