"""Kernels compiled for GPUs ahead of time: no spilled registers, and tensor cores where they belong."""

import json
import os
import subprocess
import sys

import compiled as compiler
import pytest
import triton

from sparsefw.kernels.operation import OPERATIONS

pytestmark = pytest.mark.slow

INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}


# All rows, and some as if the table were of other kernels.
RUNS = f"""
import pathlib
import sys
sys.path[:0] = [{str(compiler.REPO / "bench")!r}, {str(compiler.REPO)!r}]
import compiled
compiled.main(["--json", "all.json"])
compiled.RESULTS = pathlib.Path("known.json")
compiled.main(["--json", "again.json", "--only", "mirror_lower 4096x4096"])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[list[dict]]:
    """All rows, and rows that are compiled again.

    Made in one process of their own, since in this one the interpreter may be on. Launches that are the same as in the
    committed table need not be compiled.
    """
    folder = tmp_path_factory.mktemp("triton")
    known = json.loads(compiler.RESULTS.read_text(encoding="utf-8"))
    for row in known["rows"]:
        row |= {"fingerprint": "0", "registers": 0}
    (folder / "known.json").write_text(json.dumps(known))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    subprocess.run([sys.executable, "-c", RUNS], cwd=folder, env=environment, check=True)
    return [json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("all", "again")]


@pytest.fixture(scope="module")
def compiled(runs) -> list[dict]:
    """Every row of compiled.py."""
    return runs[0]


def test_every_kernel_is_compiled_for_every_target(compiled):
    for name in OPERATIONS:
        assert {case["target"] for case in compiled if case["name"].split()[0] == name} == set(INSTRUCTION), name
    # No two launches have one name.
    numbers = (len(x.launches) + len(compiler.SIZES) * len(x.settings) for x in OPERATIONS.values())
    assert len(compiler.launches()) == sum(numbers)


def test_the_committed_table_is_true(compiled):
    committed = json.loads(compiler.RESULTS.read_text(encoding="utf-8"))
    # The fingerprint changes with a line's number, too.
    rows, compiled = ([row | {"fingerprint": ""} for row in each] for each in (committed["rows"], compiled))
    if committed["triton"] != triton.__version__:
        # With another compiler the launches are the same; the code need not be.
        known = ("name", "target", "config")
        rows, compiled = ([{name: row[name] for name in known} for row in each] for each in (rows, compiled))
    assert compiled == rows, "python bench/compiled.py --json bench/results/compiled.json makes it anew"


def test_what_is_not_the_same_is_compiled_again(runs):
    assert {case["target"] for case in runs[1]} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert all(row["registers"] for row in runs[1])


def test_nothing_spills_and_shared_memory_fits(compiled):
    for case in compiled:
        assert compiler.problems(case) == []
    small = next(case for case in compiled if case["target"] == "sm_80")
    (line,) = compiler.problems(small | {"shared": 100 * 1024})
    assert line == f"{small['name']} on sm_80 ({small['config']}): 102400 shared, limit 101376"


def test_instructions_are_counted_by_loop():
    lines = ["MOV R1, c[0x0][0x28] ", "FADD R2, R2, R3 ", "@P0 IMAD R4, R4, R5, R6 ", "@P0 BRA 0x10 "]
    # What a branch skips does not count, if it is long, as here.
    lines += ["@!P1 BRA 0x800 ", *["LOP3.LUT R1, R2, R3 "] * 123]
    lines += ["@P2 ISETP.NE.AND P0, PT, R1, RZ, PT ", "NOP", "EXIT "]
    sass = "\n".join(f"        /*{16 * n:04x}*/    {line};" for n, line in enumerate(lines))
    assert compiler.instructions(sass) == [[4, 2], [3, 0]]


def test_rows_stay_in_the_registers_they_are_loaded_to(compiled):
    """Shared memory is for sums over a row: no entry goes through it to another thread, whatever its type's size."""
    rows = [case for case in compiled if case["name"].split()[0] in ("lmo", "row_step", "conjugate_step")]
    assert len(rows) > 50
    for case in rows:
        assert case["shared"] <= 256, case


PRODUCTS = {"product", "gram_accumulate", "cross_accumulate"}


def test_products_use_the_tensor_cores(compiled):
    products = [case for case in compiled if case["name"].split()[0] in PRODUCTS]
    assert len(products) > 10
    for case in products:
        operation, launch = compiler.launches()[case["name"]]
        unit = operation.cost_of(operation.example(launch.size, **launch.setting)).unit
        # AMD's matrix cores multiply fp32 without rounding, too.
        none = unit == "ieee" and case["target"] != "gfx942"
        assert case["tensor_cores"] == ([] if none else [INSTRUCTION[case["target"]]]), case


def test_large_products_are_read_by_bulk_copies(compiled):
    for case in compiled:
        kernel, shape, dtype, *_ = case["name"].split()
        if kernel in ("gram_accumulate", "cross_accumulate"):
            # Small matrices, fp32 and unaligned rows are read through pointers.
            aligned = shape.split("x")[1] not in ("576", "4100")
            large = case["target"] in ("sm_90", "sm_100") and "float16" in dtype and aligned
        else:
            large = kernel == "product" and "BLOCK_N=256" in case["config"]
        assert case["bulk_copies"] == large, case
    assert {case["name"].split()[0] for case in compiled if case["bulk_copies"]} == PRODUCTS
