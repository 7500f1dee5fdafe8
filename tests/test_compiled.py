"""The code that GPUs would run, compiled ahead of time: no spilled registers, and tensor cores where they belong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Shared memory that one program may ask for, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Every case of compile_ahead.py. A process of its own: in this one the interpreter may be on."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def label(case: dict) -> str:
    return f"{case['name']} on {case['target']}: {case}"


def test_every_kernel_is_compiled_for_every_target(compiled):
    kernels = {case["name"].split()[0] for case in compiled}
    assert kernels == {"product", "gradient", "gram", "cross", "lmo", "step", "swaps", "update"}
    for kernel in kernels:
        assert {case["target"] for case in compiled if case["name"].startswith(kernel)} == set(INSTRUCTION)


def test_nothing_spills(compiled):
    for case in compiled:
        assert case["spills"] == 0, label(case)
        # ptxas may set aside a few bytes that no instruction touches.
        assert case["stack"] <= (16 if case["target"].startswith("sm") else 0), label(case)


def test_shared_memory_fits(compiled):
    for case in compiled:
        assert case["shared"] <= SHARED[case["target"]], label(case)


def test_products_use_the_tensor_cores(compiled):
    products = [case for case in compiled if case["name"].split()[0] in ("product", "gradient", "gram", "cross")]
    assert len(products) > 10
    for case in products:
        expected = [] if "ieee" in case["name"] else [INSTRUCTION[case["target"]]]
        assert case["instructions"] == expected, label(case)


def test_tiles_are_loaded_ahead(compiled):
    # Without the asynchronous pipeline only a fraction of these buffers is there.
    for case in compiled:
        if case["name"] in ("product bf16 4096x4096", "product tf32 4096x4096") and case["target"] == "sm_90":
            assert case["shared"] == 4 * (128 + 256) * 128, label(case)
        if case["name"] in ("gram bf16 4096", "cross bf16 4096x4096") and case["target"] == "sm_90":
            assert case["shared"] == 4 * (128 + 128) * 128, label(case)
        if case["name"] == "cross bf16 4096x4096" and case["target"] == "sm_80":
            # mma.sync reads its operands to registers: one buffer less than stages.
            assert case["shared"] == 2 * (128 + 128) * 128, label(case)
