"""Describe this machine, and measure its roofs: how fast it copies, and how fast its library multiplies."""

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from host import commit, cpu, output
from timing import DEVICE, GPU, Stopwatch, race

from sparsefw.caller import products_of_fp32

# Bytes that are copied, and rows of the square matrices that are multiplied.
COPIED, SIDE = (1 << 30, 8192) if GPU else (256 << 20, 3072)


def describe() -> dict[str, Any]:
    """Describe what times depend on."""
    # It reads an environment variable, which `timing` sets.
    import triton

    # nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves.
    this = f"--id=GPU-{torch.cuda.get_device_properties().uuid}" if GPU else ""
    query = partial(output, "nvidia-smi", "--format=csv,noheader", this)
    return dict(
        device=torch.cuda.get_device_name() if GPU else cpu(),
        threads=torch.get_num_threads(),
        driver=query("--query-gpu=driver_version") if GPU else None,
        clocks=query("--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem") if GPU else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit(),
        capability="sm_{}{}".format(*torch.cuda.get_device_capability()) if GPU else None,
    )


def roofs(limit: float) -> dict[str, float]:
    """Measure bytes per second of a copy, and flops per second of the library's products by their precision.

    A CPU has no tf32; its bf16 counts only if it is faster than fp32.

    Args:
        limit: seconds for each.
    """
    source, target = torch.ones(2, COPIED // 4, device=DEVICE)
    # A copy by a CPU also reads what it overwrites, so that a change in place is faster.
    rates = {"copy": 2 * COPIED / _seconds(partial(target.copy_, source) if GPU else target.neg_, limit)}
    for precision in ("ieee", "bf16", *["tf32"] * GPU):
        A, B = torch.randn(2, SIDE, SIDE, device=DEVICE)
        options = {}
        if precision == "bf16":
            A, B = A.bfloat16(), B.bfloat16()
            # On a CPU torch has no such product, and rounds the result to bf16.
            options = dict(out_dtype=torch.float32) if GPU else {}
        with products_of_fp32("ieee", "tf32" if precision == "tf32" else "ieee"):
            rates[precision] = 2 * SIDE**3 / _seconds(partial(torch.mm, A, B, **options), limit)
    if not GPU and rates["bf16"] < rates["ieee"]:
        del rates["bf16"]
    return rates


def _seconds(run: Callable[[], object], limit: float) -> float:
    """Time calls until their mean is steady; returns the fastest: a roof is what the machine can do."""
    run()
    return min(race({"": Stopwatch(run)}, limit)[""])
