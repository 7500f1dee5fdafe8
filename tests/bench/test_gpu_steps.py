"""The steps of the first hour on a GPU, at tiny sizes and without one; their limits; what is read from other tools."""

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gpu_lines
import gpu_products
import gpu_reconstruct
import gpu_rows
import gpu_runs
import gpu_steps
import operations
import psutil
import pytest
import torch
from helpers.pretended_gpu import pretended_gpu

import sparsefw.run

BENCH = Path(__file__).resolve().parents[2] / "bench"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def lines(tmp_path, scratch):
    """Runs a part in this process, at tiny sizes; returns its lines."""

    def run(name):
        module, _, function = gpu_steps.FUNCTIONS[name].partition(".")
        part = gpu_lines.Part(name, tmp_path, scratch, tiny=True)
        getattr(importlib.import_module(module), function)(part)
        assert not any("wrong" in row for row in part.lines(name))
        return part.lines(name)

    return run


def test_the_script_runs_a_part(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [BENCH / "gpu.sh", tmp_path, "gram", "--tiny", "--scratch", tmp_path]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    lines = gpu_lines.Part("gram", tmp_path, tmp_path).lines("gram")
    assert [line["way"] for line in lines if "way" in line] == ["bare", "triton"] * 2


def test_kernels_are_tested(lines):
    (row,) = lines("kernel tests")
    assert re.match(r"\d+ passed in", row["summary"])


def test_a_test_that_fails_ends_its_part(capfd):
    with pytest.raises(SystemExit, match="3"):
        gpu_lines.python("-c", "print('FAILED a test'); raise SystemExit(3)")
    assert capfd.readouterr().out == "FAILED a test\n"


def test_products_stand_beside_the_library_and_their_roof(lines):
    assert {row["roof"] for row in lines("roofs")} == {"copy", "bf16", "tf32", "ieee"}
    for name in ("product", "gram_accumulate", "cross", "packed"):
        rows = lines(name)
        assert [row["way"] for row in rows if "way" in row] == ["bare", "triton"] * 2
        assert all(row["share_of_roof"] > 0 for row in rows if "way" in row)
        assert sum("speed_of_the_library" in row for row in rows) == 2
    assert sum("products_in_bf16" in row for row in lines("exact")) == 2


def test_a_wrong_product_gets_no_time(tmp_path, monkeypatch):
    part = gpu_lines.Part("product", tmp_path, tmp_path, tiny=True)
    made = gpu_products.product(5, 12)
    made.ways["triton"] = lambda: (2 * made.ways["bare"]()[0],)
    assert gpu_products.beside_the_library(part, made, rows=5) is None
    assert [row.get("way", row.get("wrong", "")[:7]) for row in part.lines("product")] == ["bare", "differs"]


def test_row_kernels_are_timed_and_repeated(lines):
    assert {row["operation"] for row in lines("row kernels")} == set(gpu_rows.OPERATIONS)
    assert {row["operation"] for row in lines("lmo")} == {"lmo"}
    assert [row["runs_that_differ"] for row in lines("repeats")] == [0] * len(gpu_rows.REPEATED)


@pytest.mark.parametrize("name", gpu_rows.OPERATIONS)
def test_the_host_does_not_wait_in_what_is_timed(name, monkeypatch):
    """Its wait would count as the kernel's time."""

    def normal(*shape, dtype=torch.float32, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)

    monkeypatch.setattr(operations, "DEVICE", "cuda")
    monkeypatch.setattr(operations, "normal", normal)
    with pretended_gpu() as gpu:
        operation = gpu_rows.OPERATIONS[name](8, 32)
        arguments = operation.fresh()
        gpu.waits.clear()
        operation.ways["triton"](*arguments)
        assert not gpu.waits


def test_steps_of_a_reconstruction_are_timed_and_give_the_same_bits(lines):
    rows = lines("reconstruction")
    assert [row["model"] for row in rows] == [name for name in gpu_reconstruct.BLOCKS for _ in range(3)]
    assert all(row["gradients_ms"] > 0 and row["adam_ms"] > 0 for row in rows if "adam_ms" in row)
    assert [row["differs"] for row in rows if "differs" in row] == [0] * 3


def forked(command, **options):
    """`python -m sparsefw.run` as a copy of this process, which need not import anything."""
    process = multiprocessing.get_context("fork").Process(target=sparsefw.run.main, args=(command[3:],))
    process.start()
    wait = lambda: (process.join(), process.exitcode)[1]  # noqa: E731
    return SimpleNamespace(poll=lambda: process.exitcode, kill=process.kill, wait=wait)


BLOCKS = ["block on the GPU", "block in host memory", "8B cold", "8B warm", "8B within 16 GiB", "8B killed"]


@pytest.mark.parametrize(
    ("names", "same"), [(["block compiled", "block profiled", "recovery"], [True]), (BLOCKS, [True] * 4)]
)
def test_runs(names, same, lines, set_threads, monkeypatch):
    # A pool of threads does not survive the fork.
    set_threads(1)
    monkeypatch.setattr(gpu_runs, "subprocess", SimpleNamespace(Popen=forked, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(gpu_runs, "launch", lambda arguments, environment: (sparsefw.run.main(arguments), ""))
    rows = [row for name in names for row in lines(name)]
    reports = [row for row in rows if "seconds" in row]
    assert len(reports) == len(names) - ("recovery" in names)
    assert all(0 < row["relative_error"] < 1 and row["seconds"]["solve"] > 0 for row in reports)
    assert [value for row in rows for name, value in row.items() if name.startswith("same_bytes")] == same


def test_limits_of_a_step_fit_into_eight_minutes():
    assert max(sum(limit for limit, _ in parts.values()) for parts in gpu_steps.STEPS.values()) <= 470


@pytest.mark.parametrize(
    ("code", "limit", "end"),
    [
        ("", 20, "done"),
        ("part.add(child=subprocess.Popen(['sleep', '600']).pid)", 20, "done"),
        ("part.add(child=subprocess.Popen(['sleep', '600']).pid); time.sleep(600)", 2, "cut off after 2 s"),
        ("raise RuntimeError('an illegal memory access')", 20, "failed with status 1"),
        ("os.kill(os.getpid(), 9)", 20, "failed with status -9"),
    ],
)
def test_a_part_leaves_its_lines_and_says_how_it_ended(code, limit, end, tmp_path, monkeypatch):
    module = f"import subprocess, sys, time, os\nsys.path.insert(0, {str(BENCH / 'gpu')!r})\n"
    module += "from gpu_lines import Part\nfrom pathlib import Path\n"
    module += f"part = Part('a part', Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))\npart.add(value=1)\n"
    monkeypatch.setattr(gpu_steps, "command_of", lambda part: [sys.executable, "-c", module + code])
    part = gpu_lines.Part("a part", tmp_path, tmp_path)
    gpu_steps.run_limited(part, limit)
    first, *children, last = part.lines("a part")
    assert first["value"] == 1
    assert last["end"].startswith(end)
    for row in children:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            psutil.Process(row["child"]).wait(5)
    if code.startswith("raise"):
        assert last["last_lines"][-1] == "RuntimeError: an illegal memory access"


def test_bits_that_differ_are_counted():
    values = iter([1.0, 1.0, -0.0, torch.nan, torch.nan])
    # From one state: 1, 1, -0, NaN.
    found = gpu_rows.differing(lambda: (torch.tensor([0.0, next(values)]),), 4)
    assert found == {"repeats": 4, "runs_that_differ": 2, "most_entries_that_differ": 1}
    assert gpu_rows.differing(lambda: (torch.tensor([torch.nan]),), 3)["runs_that_differ"] == 0


def test_kernels_are_compiled(lines, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    # `compile_kernels` sets it.
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    row, summary = lines("compile")
    assert (row["target"], row["spills"], summary["cases"], summary["spilled"]) == ("sm_90", 0, 1, [])
    assert row["registers"] > 0
