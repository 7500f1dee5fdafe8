"""Probe the GPU before anything is read, so that kernels that do not compile end a run in its first seconds."""

import functools
import os
import subprocess
from typing import Any

import torch

from sparsefw.errors import InputError, Say, first_line, fitted, option, shown
from sparsefw.solver.config import PruneConfig

# The lowest compute capability that the kernels support.
MIN_CAPABILITY = (8, 0)

# The oldest driver for each major version of CUDA that torch may be built for.
DRIVERS = {"12": 525, "13": 580}

CHECK_DRIVER = "check the GPU's driver (nvidia-smi)"
_NO_LIBRARY = "run ldconfig, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"

# Remedies, by words in the error messages of Triton, torch and the C compiler.
REMEDIES = {
    "C compiler": "Triton needs a C compiler: apt install gcc",
    "returned non-zero exit status": "the C compiler's message is above; most often Python's headers are missing: "
    "apt install python3-dev",
    "libcuda": _NO_LIBRARY,
    "active drivers": _NO_LIBRARY,
    "ldconfig": _NO_LIBRARY,
    "no kernel image": "this build of torch does not support this GPU: install another build",
    "image is invalid": "the driver is too old for Triton's assembler: update the driver",
    "Permission denied": "set TRITON_CACHE_DIR to a folder that can be written to",
    "No space left": "set TRITON_CACHE_DIR to a folder with space",
}


def say_kernel(config: PruneConfig, say: Say) -> None:
    """Probe the GPU if the run needs it, and log the choice of the kernel with its reason.

    Raises:
        InputError: as for `probe_gpu`.
    """
    cuda, first = torch.cuda.is_available(), False
    if config.kernel == "triton" and cuda:
        first = probe_gpu()
    if config.kernel == "triton" and (not cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        cause = "TRITON_INTERPRET is set" if cuda else f"as asked; {why_no_gpu()}"
        why = f"{cause}, so Triton's interpreter: exact and slow"
    elif "kernel" in config.given:
        why = "as asked"
    else:
        why = "CUDA is available" if cuda else why_no_gpu()
    compiles = "; compiles for this GPU once, half a minute in all" if first else ""
    for line in fitted(f"kernel: {config.kernel} ({why}), precision {config.precision}{compiles}"):
        say(line)


def why_no_gpu() -> str:
    """Say in words why there is no GPU: torch is built without CUDA, or torch finds no GPU, perhaps for its driver."""
    built = torch.version.cuda
    if not built:
        return "no CUDA device"
    driver = DRIVERS.get(built.partition(".")[0])
    needs = f"; with one, its driver must be {driver} or later, see nvidia-smi" if driver else ""
    return f"torch for CUDA {built} finds no GPU{needs}"


@functools.cache
def probe_gpu() -> bool:
    """Run products and a kernel on the current GPU, once per process. Returns whether Triton compiled the kernel.

    Raises:
        InputError: a product or the kernel fails; the message names the cause and the remedy.
    """
    from triton import TritonError, knobs

    from sparsefw.kernels.mirror import mirror_lower

    compiled: list[bool] = []
    before, remedy_torch = knobs.compilation.listener, f"or give {option('kernel', 'torch')}"

    def listen(*, cache_hit: bool, **others: Any) -> None:
        compiled.append(not cache_hit)

    knobs.compilation.listener = listen
    name = "the GPU"
    try:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        G = torch.tensor([[1.0, 0.0], [2.0, 3.0]]).to("cuda")
        # Products and a sum of torch, which may be built for other GPUs.
        with_torch = (G.bfloat16() @ G.bfloat16() + G).sum().item()
        found = mirror_lower(G).tolist() if capability >= MIN_CAPABILITY else []
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError, TritonError) as error:
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in str(error)), CHECK_DRIVER)
        raise InputError(
            f"{name}: cannot run a kernel: {shown(first_line(error))}; {remedy}; {remedy_torch}"
        ) from error
    finally:
        knobs.compilation.listener = before
    if capability < MIN_CAPABILITY:
        oldest, has = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
        raise InputError(f"{name}: of compute capability {has}, and Triton's kernels need {oldest}; {remedy_torch[3:]}")
    if with_torch != 24 or found != [[1.0, 2.0], [2.0, 3.0]]:
        raise InputError(f"{name}: kernels give wrong results: {with_torch}, {found}; {CHECK_DRIVER}; {remedy_torch}")
    return any(compiled)
