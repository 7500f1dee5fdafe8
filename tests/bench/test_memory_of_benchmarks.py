"""Benchmarks that a GPU's memory does not hold are left out. What each takes at most is counted on a pretended GPU."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import operations
import pytest
import torch
import triton
from helpers.pretended_gpu import pretended_gpu
from operations import LLAMA, PEAKS, memory_needed
from triton.backends.compiler import GPUTarget

from sparsefw.kernels import cpu

PATH = Path(operations.__file__).parent / "kernels/bench_operations.py"
spec = importlib.util.spec_from_file_location("bench_operations", PATH)
bench_operations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_operations)

TOKENS, SIZES = 128, [(128, 256), (64, 384)]


def size_of(name, rows, d, tokens):
    """The size of a case of an operation."""
    special = {"gram_accumulate": (tokens, d), "cross_accumulate": (tokens, rows, d), "mirror_lower": (d,)}
    return special.get(name, (rows, d))


def normal(*shape, dtype=torch.float32, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.empty(*shape, device="cuda").copy_(drawn).to(dtype)


@pytest.fixture
def gpu(monkeypatch):
    """The pretended GPU, and the operations with a GPU's types. What is done in pieces has small ones."""
    changes = {"DEVICE": "cuda", "WEIGHT": torch.bfloat16, "PRECISION": "bf16", "TOKENS": TOKENS, "PIECE": 8}
    for name, value in (changes | {"normal": normal}).items():
        monkeypatch.setattr(operations, name, value)
    monkeypatch.setattr(cpu, "MIRRORED", 8)
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    with pretended_gpu() as gpu:
        # The library's product allocates its result alone.
        product = gpu.as_kernel(lambda E, G: E.float() @ G.float())
        monkeypatch.setattr(operations, "bare_product", lambda E, G, *, precision, out=None: product(E, G))
        yield gpu


CASES = [(make, settings, ways) for make, _, settings, ways in bench_operations.OPERATIONS if make.__name__ in PEAKS]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "settings", "ways"), CASES, ids=[make.__name__ for make, *_ in CASES])
def test_no_case_takes_more_than_is_told_and_one_takes_nearly_that(make, settings, ways, gpu):
    for shape in SIZES:
        size, start, peaks = size_of(make.__name__, *shape, TOKENS), gpu.allocated, []
        for setting in settings:
            for way in ways:
                gpu.peak = gpu.allocated
                # As `measure` of bench/conftest.py does.
                operation = make(*size, **setting)
                if way != "torch":
                    operation.check(operation.result(way), operation.result("torch"))
                operation.ways[way](*operation.fresh())
                peaks.append(gpu.peak - start)
                del operation
        # A check's float64 copies are counted in full, though other tensors are gone by then.
        needed = memory_needed(make.__name__, size)
        assert needed / 1.4 <= max(peaks) <= needed


@pytest.mark.parametrize(
    ("gib", "left_out"),
    [
        (79, {}),
        # Operations on matrices of (d, d) alone: G has 10.6 GiB.
        (23, {name: [53248] for name, peaks in PEAKS.items() if max(b for _, b in peaks) > 6}),
    ],
)
def test_what_stays_on_a_gpu(gib, left_out):
    found = {}
    for name in PEAKS:
        for rows, d in LLAMA:
            mark = bench_operations.mark(name, size_of(name, rows, d, 8192), gib << 30).mark
            if mark.args[0]:
                found.setdefault(name, []).append(d)
                assert f"of GPU memory, {gib:.1f} are free" in mark.kwargs["reason"]
    assert found == left_out
