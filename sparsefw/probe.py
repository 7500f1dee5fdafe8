"""Look at the GPU before anything is read: a run should not find out after minutes that kernels cannot be compiled."""

import functools
import subprocess
from typing import Any

import torch

from sparsefw.errors import InputError, first_line, option, shown
from sparsefw.solver.config import PruneConfig

# The oldest GPUs that the kernels are compiled for.
LEAST_CAPABILITY = (8, 0)

# The oldest driver for each version of CUDA that torch may be built for.
DRIVERS = {"11": 450, "12": 525, "13": 580}

_NO_LIBRARY = "the driver's library is not found; a container has to be started with its GPU (docker run --gpus all)"

# Remedies by words of the errors of Triton, torch and the C compiler.
REMEDIES = {
    "C compiler": "Triton builds its launcher with one: apt install gcc",
    "returned non-zero exit status": "the C compiler's own lines are above; most often Python's headers are missing: "
    "apt install python3-dev",
    "libcuda": _NO_LIBRARY,
    "active drivers": _NO_LIBRARY,
    "no kernel image": "this version of torch is not built for this GPU: install another one",
    "image is invalid": "Triton assembles for a newer driver than this one: update the driver",
    "Permission denied": "set TRITON_CACHE_DIR to a folder that can be written to",
    "No space left": "set TRITON_CACHE_DIR to a folder with space",
}


def kernel_line(config: PruneConfig) -> str:
    """Probe the GPU if the kernels of a run need it; returns the line of the log that says which kernel runs, and why.

    Raises:
        InputError: as `probe_gpu`.
    """
    cuda, first = torch.cuda.is_available(), False
    if config.kernel == "triton" and cuda:
        first = probe_gpu()
    if config.kernel == "triton" and not cuda:
        why = "as asked; no CUDA device, so Triton's interpreter: exact and slow"
    elif "kernel" in config.given:
        why = "as asked"
    else:
        why = "CUDA is available" if cuda else no_device()
    compiles = "; compiles for this GPU once, half a minute in all" if first else ""
    return f"kernel: {config.kernel} ({why}), precision {config.precision}{compiles}"


def no_device() -> str:
    """Why there is no GPU: torch is built without CUDA, or finds no device and may need another driver."""
    built = torch.version.cuda
    if not built:
        return "no CUDA device"
    driver = DRIVERS.get(built.partition(".")[0])
    needs = f"; with one, its driver must be {driver} or later, see nvidia-smi" if driver else ""
    return f"torch for CUDA {built} finds no GPU{needs}"


@functools.cache
def probe_gpu() -> bool:
    """Compile and run a kernel on the current GPU, once a process; returns whether Triton had to compile it.

    Raises:
        InputError: it does not run; the message names what is missing, and the remedy.
    """
    from triton import TritonError, knobs

    from sparsefw.kernels.mirror import mirror_lower

    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    without = f"or give {option('kernel', 'torch')}"
    if capability < LEAST_CAPABILITY:
        least, has = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        raise InputError(f"{name}: of compute capability {has}, and Triton's kernels need {least}; {without[3:]}")
    compiled: list[bool] = []
    before = knobs.compilation.listener

    def listen(*, cache_hit: bool, **others: Any) -> None:
        compiled.append(not cache_hit)

    knobs.compilation.listener = listen
    try:
        found = mirror_lower(torch.tensor([[1.0, 0.0], [2.0, 3.0]]).to("cuda")).tolist()
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError, TritonError) as error:
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in str(error)), "see the GPU's driver")
        raise InputError(
            f"{name}: Triton cannot run a kernel: {shown(first_line(error))}; {remedy}; {without}"
        ) from error
    finally:
        knobs.compilation.listener = before
    if found != [[1.0, 2.0], [2.0, 3.0]]:
        raise InputError(f"{name}: a kernel gives wrong results: {found}; see the GPU's driver; {without}")
    return any(compiled)
