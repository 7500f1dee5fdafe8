"""Step 1: what the machine is, all kernels compiled for its card, and the kernels' tests."""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from typing import Any

import torch
from gpu_lines import REPO, Part, python

WORKERS = 12

# Only these cases are compiled where everything is tiny.
TINY_CASES = "lmo 576"


def machine(part: Part) -> None:
    """The card, the machine and the versions."""
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    names = ("torch", "triton", "transformers", "msgspec", "numpy", "pytest", "pytest-xdist", "datasets")
    versions = {name: installed.get(name, "not installed") for name in names}
    versions |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    versions |= {"gcc": _first_line("gcc", "-dumpfullversion")}
    part.add(commit=_first_line("git", "describe", "--always", "--dirty"), versions=versions)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = shutil.disk_usage(part.scratch).free
    part.add(cpus=os.cpu_count(), host_gib=memory // 2**30, disk_free_gib=disk // 2**30)
    if torch.cuda.is_available():
        part.add(summary=torch.cuda.get_device_name(), card=str(torch.cuda.get_device_properties(0)))
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,memory.free,power.limit,"
        query += "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
        done = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=False)
        part.add(nvidia_smi=done.stdout.splitlines())


def _first_line(*command: str) -> str:
    """The first line that a program prints."""
    if not shutil.which(command[0]):
        return "not installed"
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    return "".join(done.stdout.splitlines()[:1])


def capability() -> int:
    """The compute capability of this machine's GPU, 90 for 9.0. Without one: that of an H100."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def target_of(number: int) -> str:
    """The target of `compiled.TARGETS` whose launches this capability makes."""
    return "sm_100" if number >= 100 else "sm_90" if number >= 90 else "sm_80"


@cache
def _cases(number: int) -> dict[str, Any]:
    """The cases for this capability, by name. The target is this card exactly, as its own launches have it."""
    import compiled

    compiled.TARGETS["here"] = compiled.GPUTarget("cuda", number, 32)
    return {case.name: case for case in compiled.select("") if target_of(number) in case.targets}


def compile_case(name: str, number: int) -> dict[str, Any]:
    """Compile a case into Triton's cache, where launches of the same shape and types find it."""
    import compiled

    started, case = time.perf_counter(), _cases(number)[name]
    try:
        row = compiled.compile_launch("here", case)
    except (OSError, subprocess.CalledProcessError) as error:
        # The kernel is compiled by then. The tool that counts its registers is missing or fails.
        row = {"not_counted": str(error).splitlines()[0]}
    return {"case": name, "compile_s": round(time.perf_counter() - started, 2), **row, "target": f"sm_{number}"}


def compile_kernels(part: Part) -> None:
    """Compile the cases of `bench/compiled.py` for this card with many processes at once."""
    # The interpreter compiles nothing. Set before anything imports Triton, for the workers too.
    os.environ["TRITON_INTERPRET"] = "0"
    number, started = capability(), time.perf_counter()
    names = [name for name in _cases(number) if not part.tiny or name == TINY_CASES]
    spilled = []
    # Not forked: this process may have used the GPU.
    with ProcessPoolExecutor(WORKERS if not part.tiny else 1, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_case, name, number): name for name in names}
        for future in as_completed(futures):
            if error := future.exception():
                part.add(case=futures[future], failed=f"{type(error).__name__}: {error}"[:2000])
                continue
            row = future.result()
            part.add(**row)
            spilled += [row["case"]] * bool(row.get("spills") or row.get("stack"))
    part.add(cases=len(names), all_s=round(time.perf_counter() - started, 1), spilled=spilled)


def kernel_tests(part: Part) -> None:
    """The tests of the kernels on the GPU; each result is printed as soon as it is there."""
    tests = "tests/kernels/test_launch.py" if part.tiny else "tests/kernels"
    options = ["-v", *["--gpu"] * torch.cuda.is_available()]
    if importlib.util.find_spec("xdist") and not part.tiny:
        options += ["-n", WORKERS]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=60"]
    part.add(tests=tests, summary=python("-m", "pytest", *options, tests)[-1].strip("= "))
