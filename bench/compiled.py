"""Compile every kernel for every GPU target, without a GPU: `python bench/compiled.py`.

Each launcher is called with tensors on the meta device and a stub in place of the driver. So it compiles what a launch
would compile: the configuration for the shape, and the specialisation of every argument. A row of the table has the
registers of a thread, bytes of stack and of shared memory, instructions that load or store spilled registers, and
tensor-core and bulk-copy instructions.

To compile all of them takes a minute. A row has a fingerprint of all that the compiler is given: with --known, rows of
launches that are the same are taken from a file that the same version of Triton has made.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import triton
from compiled_cases import cases
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# mma.sync is Ampere's, wgmma Hopper's and tcgen05 Blackwell's. No name contains another.
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
BULK_COPY = "cp.async.bulk.tensor"

RESULTS = Path(__file__).with_name("results") / "compiled.json"


def stub_driver(target: GPUTarget) -> SimpleNamespace:
    """The part of a driver that compiling needs."""
    functions = {"device": lambda: 0, "stream": lambda device=None: 0, "target": lambda: target}
    return SimpleNamespace(**{f"get_current_{name}": function for name, function in functions.items()})


class Compiled(Exception):
    """Raised in a launcher in place of the launch; carries the compiled kernel, None if it is known."""

    def __init__(self, kernel, options: dict):
        self.kernel = kernel
        self.options = options


# These columns name the launch. The fingerprint decides all others.
LAUNCH = ("name", "target")


def fingerprint(function: triton.JITFunction, specialization: str) -> str:
    """A digest of all that the compiler is given: sources, types, constants, options and target.

    Args:
        function: the kernel.
        specialization: the rest as JSON, by Triton.
    """
    given = json.loads(specialization)
    # The folder of Triton's installation makes no difference.
    given["options"]["extern_libs"] = [[name, Path(path).name] for name, path in given["options"]["extern_libs"] or []]
    return hashlib.sha256(f"{function.cache_key}{json.dumps(given, sort_keys=True)}".encode()).hexdigest()[:16]


def compile_launch(target: str, launch: Callable[[], object], known: Mapping[str, dict] | None = None) -> dict:
    """What `launch` would run on `target`: configuration, registers, stack and shared memory in bytes, instructions.

    Args:
        target: one of TARGETS.
        launch: calls a launcher.
        known: rows by their fingerprint, which need not be compiled.
    """
    run, found = triton.JITFunction.run, []

    def is_known(fn, compile, **others) -> bool:
        found.append(fingerprint(fn.jit_function, compile["specialization_data"]))
        return found[-1] in (known or {})

    def compile_only(self, *args, grid, warmup, **kwargs):
        # The keys of this cache hold the device's number only, so it would return the binary of the last target.
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        raise Compiled(kernel, {k: v for k, v in kwargs.items() if k.startswith("BLOCK_") or k == "SEARCH_D"})

    triton.runtime.driver.set_active(stub_driver(TARGETS[target]))
    triton.JITFunction.run, triton.knobs.runtime.jit_cache_hook = compile_only, is_known
    try:
        launch()
    except Compiled as compiled:
        kernel, options = compiled.kernel, compiled.options
    finally:
        triton.JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, None
    if kernel is None:
        return {name: value for name, value in known[found[-1]].items() if name not in LAUNCH} | {"target": target}
    code = kernel.asm["amdgcn"] if target == "gfx942" else kernel.asm["ptx"]
    return dict(
        target=target,
        fingerprint=found[-1],
        config=" ".join(f"{key}={value}" for key, value in options.items()),
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        tensor_cores=[name for name in TENSOR_CORES if name in code],
        bulk_copies=BULK_COPY in code,
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
        # ptxas may reserve bytes that no instruction touches, so loads and stores of local memory are counted.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", dump("--dump-sass"))) if stack else 0
    return dict(registers=int(usage["REG"]), stack=stack, spills=spills)


def _amd_usage(code: str) -> dict:
    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    # Spilled scalar registers do not count: they go to lanes of vector registers, not to memory.
    stack = read("private_segment_fixed_size")
    return dict(registers=read("vgpr_count"), stack=stack, spills=read("vgpr_spill_count"))


def read_known(path: Path | None) -> dict[str, dict]:
    """The rows of a file by their fingerprint; none if another version of Triton has made them."""
    content = json.loads(path.read_text(encoding="utf-8")) if path else {"triton": None}
    return {row["fingerprint"]: row for row in content["rows"]} if content["triton"] == triton.__version__ else {}


def compile_all(pattern: str = "", known: Mapping[str, dict] | None = None) -> Iterator[dict]:
    """A row of the table for every target of every case whose name contains `pattern`; `known` as `compile_launch`."""
    for case in cases():
        for target in case.targets:
            if pattern in case.name:
                yield dict(name=case.name) | compile_launch(target, case.launch, known)


def table(rows: list[dict]) -> str:
    """The table in Markdown."""
    names = ("name", "target", "config", "warps", "stages", "registers", "stack", "spills", "shared")
    lines = [[*names, "instructions"], ["---"] * (len(names) + 1)]
    for row in rows:
        instructions = " ".join(row["tensor_cores"] + [BULK_COPY] * row["bulk_copies"])
        lines.append([*(str(row[name]) for name in names), instructions])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Compile, or read the committed rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="launches whose name contains this")
    add("--json", type=Path, metavar="FILE", help="write the rows there (committed: results/compiled.json)")
    add("--known", type=Path, metavar="FILE", help="take the rows of launches that are the same from there")
    add("--table", action="store_true", help="compile nothing, print what is committed")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret and not arguments.table:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if arguments.table:
        rows = [row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if arguments.only in row["name"]]
    else:
        rows = list(compile_all(arguments.only, read_known(arguments.known)))
    if arguments.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        content = f'{{\n "triton": "{triton.__version__}",\n "rows": [\n{lines}\n ]\n}}\n'
        arguments.json.write_text(content, encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
