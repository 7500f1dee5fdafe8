"""Kernels compiled for GPUs ahead of time: no spilled registers, and tensor cores where they belong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiled as compiler
import pytest
import triton

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parents[2] / "bench"
COMMITTED = BENCH / "results" / "compiled.json"
INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


# All rows; some as if the table were of other kernels; and tiles that the interpreter never sees: it has its own.
RUNS = f"""
import pathlib
import sys
sys.path[:0] = [{str(BENCH)!r}, {str(BENCH.parent)!r}]
import compiled
compiled.main(["--json", "all.json"])
compiled.RESULTS = pathlib.Path("known.json")
compiled.main(["--json", "again.json", "--only", "mirror 4096"])
from sparsefw.kernels import mirror
mirror.configuration = lambda: dict(BLOCK=48)
compiled.main(["--only", "mirror_lower"])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[list[dict], list[dict], str]:
    """All rows, rows that are compiled again, and the end of a run that does not compile.

    Made in one process of their own, since in this one the interpreter may be on. Launches that are the same as in the
    committed table need not be compiled.
    """
    folder = tmp_path_factory.mktemp("triton")
    known = json.loads(COMMITTED.read_text(encoding="utf-8"))
    for row in known["rows"]:
        row |= {"fingerprint": "0", "registers": 0}
    (folder / "known.json").write_text(json.dumps(known))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", RUNS]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (folder / "again.json").exists(), run.stderr[-4000:]
    assert run.returncode == 1
    return *(json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("all", "again")), run.stderr


@pytest.fixture(scope="module")
def compiled(runs) -> list[dict]:
    """Every row of compiled.py."""
    return runs[0]


def label(case: dict) -> str:
    return f"{case['name']} on {case['target']}: {case}"


def test_every_kernel_is_compiled_for_every_target(compiled):
    kernels = {case["name"].split()[0] for case in compiled}
    assert kernels == {
        *("product", "gram", "mirror", "cross", "lmo", "step", "swaps", "conjugate", "adam", "packed_product"),
        *("removed", "begin_fit", "row_errors", "take_rows", "candidates", "bound_scores", "bound_sums", "rounding"),
        "unpack",
    }
    for kernel in kernels:
        assert {case["target"] for case in compiled if case["name"].startswith(kernel)} == set(INSTRUCTION)


def test_the_committed_table_is_true(compiled):
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    # The fingerprint changes with a line's number, too.
    rows, compiled = ([row | {"fingerprint": ""} for row in each] for each in (committed["rows"], compiled))
    if committed["triton"] != triton.__version__:
        # With another compiler the launches are the same; the code need not be.
        known = ("name", "target", "config")
        rows, compiled = ([{name: row[name] for name in known} for row in each] for each in (rows, compiled))
    assert compiled == rows, "python bench/compiled.py --json bench/results/compiled.json makes it anew"


def test_what_is_not_the_same_is_compiled_again(runs):
    assert len(runs[1]) == len(INSTRUCTION)
    assert all(row["registers"] for row in runs[1])


def test_nothing_spills_and_shared_memory_fits(compiled):
    for case in compiled:
        assert compiler.problems(case) == []
    small = next(case for case in compiled if case["target"] == "sm_80")
    (line,) = compiler.problems(small | {"shared": 100 * 1024})
    assert line == f"{small['name']} on sm_80 ({small['config']}): 102400 shared, limit 101376"


def test_a_launch_that_does_not_compile_is_named(runs):
    last = runs[2].splitlines()[-1]
    assert last.startswith("mirror 4096 on sm_80 does not compile with ")
    assert "'BLOCK': 48" in last


def test_a_kernel_is_selected_by_its_file_or_operation():
    selected = lambda text: {case.name.split()[0] for case in compiler.select(text)}  # noqa: E731
    assert selected("gram_accumulate") == {"gram"}
    assert selected("rows") == {"row_errors", "take_rows"}
    # The file of both operations.
    assert selected("accumulate") == {"gram", "cross"}
    with pytest.raises(SystemExit, match=r"^grm: no .* accumulate, adam, adam_step, .*, gram, gram_accumulate, "):
        compiler.select("grm")


def test_rows_stay_in_the_registers_they_are_loaded_to(compiled):
    """Shared memory is for sums over a row: no entry goes through it to another thread, whatever its type's size."""
    rows = [case for case in compiled if case["name"].split()[0] in ("lmo", "step", "conjugate")]
    assert len(rows) > 50
    for case in rows:
        assert case["shared"] <= 256, label(case)


def test_products_use_the_tensor_cores(compiled):
    products = [case for case in compiled if case["name"].split()[0] in ("product", "gram", "cross")]
    assert len(products) > 10
    for case in products:
        expected = [] if "ieee" in case["name"] else [INSTRUCTION[case["target"]]]
        assert case["tensor_cores"] == expected, label(case)


def test_large_products_are_read_by_bulk_copies(compiled):
    for case in compiled:
        kernel, *_, shape = case["name"].split()
        if kernel in ("gram", "cross"):
            # Small matrices, fp32 and unaligned rows are read through pointers.
            sixteen_bits = "bf16" in case["name"] or "fp16" in case["name"]
            large = (
                case["target"] in ("sm_90", "sm_100") and sixteen_bits and "576" not in shape and "4100" not in shape
            )
        else:
            large = kernel == "product" and "BLOCK_N=256" in case["config"]
        assert case["bulk_copies"] == large, label(case)
    assert sum(case["bulk_copies"] for case in compiled) >= 6
    assert {case["name"].split()[0] for case in compiled if case["bulk_copies"]} == {"product", "gram", "cross"}
