"""Compiles the kernels for GPUs that are not there and reads registers, spills and instructions off the code.

A launcher is called with tensors on the meta device and a stub in place of the driver, so what is compiled is what a
launch would compile: the configuration for the shape, and the specialisation of every argument. Run as a program
(`python tests/compile_ahead.py`, with TRITON_INTERPRET=0) it prints one JSON object per case.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The longest match names the instruction: mma.sync also occurs in no other name.
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "v_mfma")


class StubDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled(Exception):
    """Leaves a launcher where it would launch, with the compiled kernel."""

    def __init__(self, kernel, options: dict):
        self.kernel = kernel
        self.options = options


def compile_launch(target: str, launch: Callable[[], object]) -> dict:
    """What `launch` would run on `target`: configuration, registers, stack and shared memory in bytes, instructions."""
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        # Its keys know the device by number only: the binary of the last target would come back.
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        raise Compiled(kernel, {k: v for k, v in kwargs.items() if k.startswith("BLOCK_") or k == "SEARCH_D"})

    triton.runtime.driver.set_active(StubDriver(TARGETS[target]))
    triton.JITFunction.run = compile_only
    try:
        launch()
    except Compiled as compiled:
        kernel, options = compiled.kernel, compiled.options
    finally:
        triton.JITFunction.run = run
    code = kernel.asm["amdgcn"] if target == "gfx942" else kernel.asm["ptx"]
    return dict(
        target=target,
        config=" ".join(f"{key}={value}" for key, value in options.items()),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        instructions=[name for name in TENSOR_CORES if name in code],
        **(_amd_usage(code) if target == "gfx942" else _nvidia_usage(kernel.asm["cubin"])),
    )


def _nvidia_usage(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        stack = int(usage["STACK"]) + int(usage["LOCAL"])
        # ptxas may reserve a few bytes that no instruction touches: the loads and stores of local memory tell.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("--dump-sass"))) if stack else 0
    return dict(registers=int(usage["REG"]), stack=stack, spills=spills)


def _amd_usage(code: str) -> dict:
    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    # Spilled scalar registers are not counted: they go to lanes of vector registers, not to memory.
    stack = read("private_segment_fixed_size")
    return dict(registers=read("vgpr_count"), stack=stack, spills=read("vgpr_spill_count"))


def empty(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def step(rows: int, d: int, k: int | Tensor, fixed: bool = True, **options) -> object:
    """Calls row_step on a bf16 weight."""
    from sparsefw.kernels.step import row_step

    W, state, V = empty(rows, d, torch.bfloat16), empty(rows, d), empty(rows, d, torch.bool)
    return row_step(W, state[0], state, state, state, V, W, k, fixed=V if fixed else None, **options)


def cases() -> Iterator[tuple[str, tuple[str, ...], Callable[[], object]]]:
    """Name, targets and launch of every case: realistic shapes, each configuration at least once."""
    from sparsefw.kernels.fused import (
        convex_update,
        cross_accumulate,
        gradient,
        gram_accumulate,
        lmo,
        product,
        row_swaps,
    )

    every, nvidia, hopper = tuple(TARGETS), ("sm_80", "sm_90"), ("sm_90",)
    bf16, fp32 = torch.bfloat16, torch.float32

    def matmul(rows: int, d: int, dtype: torch.dtype, precision: str) -> Callable[[], object]:
        return lambda: product(empty(rows, d, dtype), empty(d, d, dtype), precision=precision)

    yield "product bf16 4096x4096", every, matmul(4096, 4096, bf16, "bf16")
    yield "product tf32 4096x4096", every, matmul(4096, 4096, fp32, "tf32")
    yield "product bf16 576x576", hopper, matmul(576, 576, bf16, "bf16")
    yield "product tf32 576x576", hopper, matmul(576, 576, fp32, "tf32")
    yield "product ieee 4096x4096", nvidia, matmul(4096, 4096, fp32, "ieee")
    yield "product bf16 8192x28672", hopper, matmul(8192, 28672, bf16, "bf16")
    # Operands of different types, the ones of a bf16 weight and an fp32 Gram matrix.
    mixed = lambda: product(empty(4096, 14336, bf16), empty(14336, 14336), precision="tf32")  # noqa: E731
    yield "product mixed 4096x14336", hopper, mixed
    for precision, dtype in (("bf16", bf16), ("tf32", fp32)):
        yield (
            f"gradient {precision} 4096x4096",
            every,
            lambda dtype=dtype, precision=precision: gradient(
                empty(4096, 4096, bf16), empty(4096, 4096), empty(4096, 4096, dtype), precision=precision
            ),
        )
    yield "gram bf16 576", hopper, lambda: gram_accumulate(empty(576, 576), empty(2048, 576, bf16))
    yield "gram bf16 4096", every, lambda: gram_accumulate(empty(4096, 4096), empty(2048, 4096, bf16))
    yield "gram bf16 14336", hopper, lambda: gram_accumulate(empty(14336, 14336), empty(2048, 14336, bf16))
    yield "gram tf32 4096", nvidia, lambda: gram_accumulate(empty(4096, 4096), empty(2048, 4096), precision="tf32")

    def cross(rows: int, d: int, dtype: torch.dtype, precision: str = "ieee") -> Callable[[], object]:
        inputs = empty(2048, rows, dtype), empty(2048, d, dtype)
        return lambda: cross_accumulate(empty(rows, d), *inputs, precision=precision)

    yield "cross bf16 1536x576", hopper, cross(1536, 576, bf16)
    yield "cross bf16 4096x4096", every, cross(4096, 4096, bf16)
    yield "cross bf16 4096x14336", hopper, cross(4096, 14336, bf16)
    yield "cross tf32 4096x4096", nvidia, cross(4096, 4096, fp32, "tf32")
    yield "cross ieee 576x576", nvidia, cross(576, 576, fp32)

    for d, targets in ((576, hopper), (4096, every), (8192, hopper), (14336, every), (28672, every), (65536, every)):
        yield (
            f"lmo {d}",
            targets,
            lambda d=d: lmo(empty(512, d), d // 2, fixed=empty(512, d, torch.bool), positive=True),
        )
        yield f"step {d}", targets, lambda d=d: step(512, d, d // 2)

    def swaps(d: int, group: int = 0, fixed: bool = True) -> Callable[[], object]:
        W, V = empty(512, d, bf16), empty(512, d, torch.bool)
        return lambda: row_swaps(W, empty(d, d), empty(512, d), V, 100, group=group, fixed=V if fixed else None)

    for d, targets in ((576, hopper), (4096, every), (28672, every)):
        yield f"swaps {d}", targets, swaps(d)
    for m, d in ((4, 4096), (32, 14336), (5, 4095)):
        yield f"swaps of {m} {d}", every, swaps(d, m, fixed=m == 4)
    for n, m in ((2, 4), (16, 32)):
        yield f"lmo {n}:{m} 4096", every, lambda n=n, m=m: lmo(empty(512, 4096), n, group=m)
        yield f"step {n}:{m} 4096", hopper, lambda n=n, m=m: step(512, 4096, n, group=m)
        yield f"step {n}:{m} 14336", every, lambda n=n, m=m: step(512, 14336, n, group=m)
    yield "step 3:5 4095", hopper, lambda: step(512, 4095, 3, group=5)
    yield "step open loop 4096", hopper, lambda: step(512, 4096, empty(512, 1, torch.int32)[:, 0], fixed=False, eta=0.5)
    update = lambda: convex_update(  # noqa: E731
        empty(512, 4096), empty(512, 4096, torch.bool), empty(512, 4096), empty(512, 4096), empty(512, 1)[:, 0]
    )
    yield "update 4096", every, update


def main(pattern: str = "") -> None:
    """Prints every case whose name contains `pattern`."""
    for name, targets, launch in cases():
        for target in targets:
            if pattern in name:
                print(json.dumps(dict(name=name) | compile_launch(target, launch)), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "0", "compiles only outside the interpreter"
    main(*sys.argv[1:])
