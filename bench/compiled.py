"""Compile every kernel for every GPU target, without a GPU: `python bench/compiled.py`.

The script calls each launcher with tensors on the meta device and a stub in place of the driver. So the launcher
compiles the same code as for a GPU: the configuration for the shape, and the specialisation of every argument. A row of
the table has the registers of a thread, bytes of stack and of shared memory, instructions that load or store spilled
registers, and tensor-core and bulk-copy instructions.

A row has a fingerprint of the compiler's inputs. The row of a launch that has not changed is taken from the committed
table, if the same version of Triton has made it. Compiling all launches takes minutes. Too much shared memory, a stack
and spilled registers are errors, as a GPU would refuse them or be slow. So is a warning of Triton, which a user would
see in the middle of a run.

After an edit of one kernel: `python bench/compiled.py --only gram --test`.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from compiled_cases import Case, operations, select
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may ask for, bytes. The target sm_80 also serves GPUs of sm_86, sm_89 and sm_120, which
# have 99 KiB in place of 163.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# mma.sync is Ampere's, wgmma Hopper's and tcgen05 Blackwell's. No name contains another.
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
BULK_COPY = "cp.async.bulk.tensor"

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "bench/results/compiled.json"


def stub_driver(target: GPUTarget) -> SimpleNamespace:
    """Make the part of a driver that compiling needs."""
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: target,
    )


class Compiled(Exception):
    """The end of a launch. Its arguments are the compiled kernel, or None for a known one, and its options."""


def fingerprint(function: triton.JITFunction, specialization: str) -> str:
    """Digest the compiler's inputs: sources, types, constants, options and target.

    Args:
        function: the kernel.
        specialization: the rest as JSON, by Triton.
    """
    inputs = json.loads(specialization)
    # The folder of Triton's installation makes no difference.
    libraries = inputs["options"]["extern_libs"] or []
    inputs["options"]["extern_libs"] = [[name, Path(path).name] for name, path in libraries]
    return hashlib.sha256(f"{function.cache_key}{json.dumps(inputs, sort_keys=True)}".encode()).hexdigest()[:16]


def compile_launch(target: str, case: Case, known: Mapping[str, dict]) -> dict:
    """Compile a launch for a target; returns its row: configuration, registers, bytes of stack and shared memory.

    Args:
        target: one of TARGETS.
        case: the launch.
        known: rows by their fingerprint. A launch with a known one is not compiled.
    """
    run, found = triton.JITFunction.run, []

    def is_known(fn, compile, **others) -> bool:
        found.append(fingerprint(fn.jit_function, compile["specialization_data"]))
        return found[-1] in known

    def compile_only(self, *args, grid, warmup, **kwargs):
        # The keys of this cache hold the device's number only, so it would return the binary of the last target.
        self.device_caches.clear()
        options = {k: v for k, v in kwargs.items() if k.isupper() or k.startswith("num_")}
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            error.add_note(f"{case.name} on {target} does not compile with {options}")
            raise
        raise Compiled(kernel, {k: v for k, v in options.items() if k.startswith("BLOCK") or k == "SEARCH_D"})

    triton.runtime.driver.set_active(stub_driver(TARGETS[target]))
    triton.JITFunction.run, triton.knobs.runtime.jit_cache_hook = compile_only, is_known
    try:
        with warnings.catch_warnings(action="error"):
            case.launch()
    except Compiled as compiled:
        kernel, options = compiled.args
    finally:
        triton.JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, None
    if kernel is None:
        # The fingerprint decides all but these.
        return known[found[-1]] | {"name": case.name, "target": target}
    code = kernel.asm["amdgcn"] if target == "gfx942" else kernel.asm["ptx"]
    return dict(
        fingerprint=found[-1],
        config=" ".join(f"{key}={value}" for key, value in options.items()),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        tensor_cores=[name for name in TENSOR_CORES if name in code],
        bulk_copies=BULK_COPY in code,
        **(_amd_usage(code) if target == "gfx942" else _nvidia_usage(kernel.asm["cubin"])),
        target=target,
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
        # ptxas may reserve bytes that no instruction touches, so loads and stores of local memory are counted.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("--dump-sass"))) if stack else 0
    return dict(registers=int(usage["REG"]), stack=stack, spills=spills)


def _amd_usage(code: str) -> dict:
    # Spilled scalar registers do not count: they go to lanes of vector registers, not to memory.
    names = dict(registers="vgpr_count", stack="private_segment_fixed_size", spills="vgpr_spill_count")
    return {key: int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for key, name in names.items()}


def read_known(path: Path) -> dict[str, dict]:
    """Read the rows of a file by their fingerprint; empty if another version of Triton has made them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {row["fingerprint"]: row for row in content["rows"]} if content["triton"] == triton.__version__ else {}


def problems(row: dict) -> list[str]:
    """Name the values of a row that are above their limit."""
    limits = {"shared": SHARED[row["target"]], "stack": 0, "spills": 0}
    label = f"{row['name']} on {row['target']} ({row['config']})"
    return [f"{label}: {row[name]} {name}, limit {limit}" for name, limit in limits.items() if row[name] > limit]


def run_tests(chosen: Iterable[Case]) -> int:
    """Run the test files that name an operation of these cases, with the interpreter's tiles and those of GPUs.

    Returns:
        The exit status of pytest.
    """
    named = {name for case in chosen for name in operations(case)}
    files = [p for p in (REPO / "tests/kernels").glob("test_*.py") if named & {*re.findall(r"\w+", p.read_text())}]
    for tiles in ((), ("--tiles=sm_80",), ("--tiles=sm_90",)):
        command = [sys.executable, "-m", "pytest", "-q", *tiles, *sorted(files)]
        if status := subprocess.run(command, cwd=REPO).returncode:
            return status
    return 0


def table(rows: list[dict]) -> str:
    """Make the table in Markdown. A value that differs from the committed one follows the committed one."""
    committed = {(row["name"], row["target"]): row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    names = ["name", "target", *(name for name in rows[0] if name not in ("name", "target", "fingerprint"))]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        pairs = [(row[name], committed.get((row["name"], row["target"]), row)[name]) for name in names]
        lines.append([f"{new}" if new == old else f"{old} -> {new}" for new, old in pairs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Compile, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="launches with this name, or of this operation or file of kernels/")
    add("--test", action="store_true", help="run the tests of these kernels first")
    add("--json", type=Path, metavar="FILE", help="write the rows there (committed: results/compiled.json)")
    arguments = parser.parse_args(argv)
    chosen = select(arguments.only)
    if arguments.only and arguments.json and arguments.json.resolve() == RESULTS:
        parser.error("the committed table has all kernels: leave out --only")
    if arguments.test and (status := run_tests(chosen)):
        sys.exit(status)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    known = read_known(RESULTS)
    rows = [{"name": c.name} | compile_launch(target, c, known) for c in chosen for target in c.targets]
    if arguments.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        content = f'{{\n "triton": "{triton.__version__}",\n "rows": [\n{lines}\n ]\n}}\n'
        arguments.json.write_text(content, encoding="utf-8")
    print(table(rows))
    if above := [line for row in rows for line in problems(row)]:
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
