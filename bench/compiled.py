"""Compile every kernel for every GPU target, without a GPU: `python bench/compiled.py`.

The script calls each launcher with tensors on the meta device and a stub in place of the driver. So the launcher
compiles the same code as for a GPU: the configuration for the shape, and the specialisation of every argument. A row of
the table has the registers of a thread, bytes of stack and of shared memory, instructions that load or store spilled
registers, and tensor-core and bulk-copy instructions.

Every setting of an operation is compiled at SIZES; other launches are in the files of `kernels/`. At the last size
expected.py computes an expected time. `instructions` of a thread are pairs, see the function.

A row has a fingerprint of the compiler's inputs. The row of a launch that has not changed is taken from the committed
table, if the same version of Triton has made it. Compiling all launches takes minutes. Too much shared memory, a stack
and spilled registers are errors, as a GPU would refuse them or be slow. So is a warning of Triton, which a user would
see in the middle of a run.

After an edit of one kernel: `python bench/compiled.py --only gram --test`.
"""

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from host import REPO

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(REPO))

import triton
from report import markdown
from triton.backends.compiler import GPUTarget

from sparsefw.kernels import triton_ops  # noqa: F401, since it imports all operations
from sparsefw.kernels.operation import ALL, HOPPER, OPERATIONS, Launch, Operation, Size

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Targets with an expected time, and its size: a matrix of Llama-3-70B.
EXPECTED, SIZE = ("sm_80", "sm_89", "sm_90"), Size(8192, 8192, tokens=8192)
# Targets and sizes for which every setting is compiled.
SIZES = ((ALL, Size(4096, 4096)), (HOPPER, Size(576, 576)), (HOPPER, Size(4096, 28672)), (EXPECTED, SIZE))
# Shared memory that one program may ask for, KiB. A GPU of sm_80 has 163, but those of sm_86 run the same tiles.
SHARED = {"sm_80": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# mma.sync is Ampere's, wgmma Hopper's and tcgen05 Blackwell's. No name contains another.
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma")
BULK_COPY = "cp.async.bulk.tensor"
# Instructions of the pipe ALU, each after its predicate, and the shortest stretch that is skipped, see `instructions`.
ALU = re.compile(r"(@!?U?P\w+ )?(I(ADD|MNMX|SETP|ABS)|VI|P?LOP|SHF|F?SEL|PRMT|LEA|F(SETP|MNMX)|POPC|SGXT|MOV)")
RARE = 64

RESULTS = REPO / "bench/results/compiled.json"


def stub_driver(target: GPUTarget) -> SimpleNamespace:
    """Make the part of a driver that compiling needs."""
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: target,
    )


def launches() -> dict[str, tuple[Operation, Launch]]:
    """List all launches by their name: each setting at SIZES, and the launches in the operation's file."""
    every = {}
    for each in OPERATIONS.values():
        usual = [Launch(*sized, setting) for sized in SIZES for setting in each.settings.values()]
        for launch in (*usual, *each.launches):
            size, setting = launch.size, (f"{key}={value}" for key, value in launch.setting.items())
            words = [each.name, f"{size.rows}x{size.d}", str(size.dtype).removeprefix("torch."), *setting]
            every[" ".join(words)] = each, launch
    return every


@cache
def needed(file: str) -> set[str]:
    """List a file of kernels/, and all files there that it imports, itself or by others."""
    source = (REPO / f"kernels/{file}.py").read_text("utf-8")
    # The files in cpu are no kernels.
    return {file}.union(*map(needed, re.findall(r"^from \.(?!cpu)(\w+) import", source, re.MULTILINE)))


def select(text: str) -> dict[str, tuple[Operation, Launch]]:
    """Find launches by their operation, by a file that their operation needs, or else by a part of their name.

    Raises:
        SystemExit: there is no such launch.
    """
    every = launches()
    words = {name: {each.name} | needed(Path(inspect.getfile(each.run)).stem) for name, (each, _) in every.items()}
    for suits in (lambda name: text in words[name], lambda name: text in name):
        if chosen := {name: every[name] for name in filter(suits, every)}:
            return chosen
    sys.exit(f"{text}: no launch, no file of kernels/ and no operation; python -m bench --list names these")


class Compiled(Exception):
    """The end of a launch. Its arguments: the compiled kernel, or None for a known one, its options and programs."""


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


def compile_launch(name: str, target: str, known: Mapping[str, dict]) -> dict:
    """Compile a launch for a target; returns its row of the table.

    Args:
        name: one of `launches`.
        target: one of TARGETS.
        known: rows by their fingerprint. A launch with a known one is not compiled.
    """
    run, found, (operation, launch) = triton.JITFunction.run, [], launches()[name]

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
            error.add_note(f"{name} on {target} does not compile with {options}")
            raise
        raise Compiled(kernel, {k: v for k, v in options.items() if k.startswith("BLOCK") or k == "SEARCH_D"}, grid[0])

    triton.runtime.driver.set_active(stub_driver(TARGETS[target]))
    triton.JITFunction.run, triton.knobs.runtime.jit_cache_hook = compile_only, is_known
    try:
        with warnings.catch_warnings(action="error"):
            operation.run(**operation.example(launch.size, **launch.setting))
    except Compiled as compiled:
        kernel, options, programs = compiled.args
    finally:
        triton.JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, None
    if kernel is None:
        # The fingerprint decides all but these.
        return known[found[-1]] | {"name": name, "target": target, "programs": programs}
    amd = kernel.asm.get("amdgcn")
    code = amd or kernel.asm["ptx"]
    return dict(
        name=name,
        fingerprint=found[-1],
        config=" ".join(f"{key}={value}" for key, value in options.items()),
        programs=programs,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        tensor_cores=[name for name in TENSOR_CORES if name in code],
        bulk_copies=BULK_COPY in code,
        **(_amd_usage(amd) if amd else _nvidia_usage(kernel.asm["cubin"])),
        target=target,
    )


def _nvidia_usage(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    stack = int(usage["STACK"]) + int(usage["LOCAL"])
    # ptxas may reserve bytes that no instruction touches, so loads and stores of local memory are counted.
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return dict(registers=int(usage["REG"]), stack=stack, spills=spills, instructions=instructions(text))


def instructions(sass: str) -> list[list[int]]:
    """Count all instructions and ALU's outside of loops, and then in each loop, but not in its inner loops.

    A branch that skips a long stretch without a loop is taken to skip it: it guards what hardly ever runs, like ties.
    """
    codes = re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", sass)
    # An instruction has 16 bytes.
    found = ((at, re.search(r"BRA.* 0x(\w+)", code)) for at, code in enumerate(codes))
    jumps = [(at, int(jump[1], 16) // 16) for at, jump in found if jump]
    loops = sorted((to, at) for at, to in jumps if to < at)
    long = [(at, to) for at, to in jumps if to - at > RARE and codes[at][0] == "@"]
    rare = [(at, to) for at, to in long if not any(at < start < to for start, _ in loops)]
    counts = [[0, 0] for _ in range(len(loops) + 1)]
    for place, code in enumerate(codes):
        if code[:3] != "NOP" and not any(at < place < to for at, to in rare):
            inner = max((n for n, (start, end) in enumerate(loops, 1) if start <= place <= end), default=0)
            counts[inner][0] += 1
            counts[inner][1] += bool(ALU.match(code))
    return counts


def _amd_usage(code: str) -> dict:
    # Spilled scalar registers do not count: they go to lanes of vector registers, not to memory.
    names = dict(registers="vgpr_count", stack="private_segment_fixed_size", spills="vgpr_spill_count")
    return {key: int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for key, name in names.items()} | {"instructions": []}


def committed() -> dict[tuple[str, str], dict]:
    """Read the rows of the committed table by name and target."""
    return {(row["name"], row["target"]): row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}


def problems(row: dict) -> list[str]:
    """Name the values of a row that are above their limit."""
    limits = {"shared": SHARED[row["target"]] << 10, "stack": 0, "spills": 0}
    label = f"{row['name']} on {row['target']} ({row['config']})"
    return [f"{label}: {row[name]} {name}, limit {limit}" for name, limit in limits.items() if row[name] > limit]


def run_tests(named: set[str]) -> int:
    """Run the test files that name one of these operations, with the interpreter's tiles and those of GPUs.

    Returns:
        The exit status of pytest.
    """
    files = [p for p in (REPO / "tests/kernels").glob("test_*.py") if named & {*re.findall(r"\w+", p.read_text())}]
    for tiles in ([], ["--tiles=sm_80"], ["--tiles=sm_90"]):
        command = [sys.executable, "-m", "pytest", "-q", *tiles, *sorted(files)]
        if status := subprocess.run(command, cwd=REPO).returncode:
            return status
    return 0


def table(rows: list[dict]) -> str:
    """Make the table in Markdown. A value that differs from the committed one follows the committed one."""
    names = ["name", "target", *(name for name in rows[0] if name not in ("name", "target", "fingerprint"))]
    known, lines = committed(), []
    for row in rows:
        pairs = [(row[name], known.get((row["name"], row["target"]), row)[name]) for name in names]
        lines.append([f"{new}" if new == old else f"{old} -> {new}" for new, old in pairs])
    return markdown(names, lines, texts=3)


def main(argv: list[str] | None = None) -> None:
    """Compile, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="launches whose name has this, or of this file of kernels/")
    add("--test", action="store_true", help="run the tests of these kernels first")
    add("--json", type=Path, metavar="FILE", help="write the rows there (committed: results/compiled.json)")
    arguments = parser.parse_args(argv)
    chosen = select(arguments.only)
    if arguments.only and arguments.json and arguments.json.resolve() == RESULTS:
        parser.error("the committed table has all kernels: leave out --only")
    if arguments.test and (status := run_tests({name.split()[0] for name in chosen})):
        sys.exit(status)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    # Rows that another version of Triton has made are not known.
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    known = {row["fingerprint"]: row for row in content["rows"] if content["triton"] == triton.__version__}
    rows = [compile_launch(name, target, known) for name, (_, each) in chosen.items() for target in each.targets]
    if arguments.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        content = f'{{\n "triton": "{triton.__version__}",\n "rows": [\n{lines}\n ]\n}}\n'
        arguments.json.write_text(content, encoding="utf-8")
    print(table(rows))
    if above := [line for row in rows for line in problems(row)]:
        sys.exit("\n".join(above))


if __name__ == "__main__":
    main()
