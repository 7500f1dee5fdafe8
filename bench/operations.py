"""Shared by the benchmarks: shapes, inputs, ways to do an operation, the correctness check, the measurement.

On a GPU the shapes are those of Llama-3.1-8B, Llama-3-70B and Llama-3.1-405B, with as many rows as one solve takes.
Without a GPU they are tiny, and the Triton kernels run in the interpreter, whose times say nothing about a GPU.
"""

from collections.abc import Callable

import torch
import triton
from cost import Cost
from timing import GPU, Moment, keep_busy, rounds_of
from torch import Tensor

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.definitions import RowState

DEVICE = "cuda" if GPU else "cpu"
# (rows, d): projections of 8B (q, down), of 70B (q, down) and of 405B (q, down).
LLAMA = [(4096, 4096), (4096, 14336), (8192, 8192), (4096, 28672), (4096, 16384), (2048, 53248)]
SHAPES = LLAMA if GPU else [(48, 96), (40, 131)]
TOKENS = 8192 if GPU else 100
PRECISION = "bf16" if GPU else "ieee"
WEIGHT = torch.bfloat16 if GPU else torch.float32
# Precision of products of inputs, which have the dtype of the weights.
UNIT = "bf16" if GPU else "ieee"

COMPILE = "torch.compile"


def ways(operation: str, **others: Callable) -> dict[str, Callable]:
    """The ways to do an operation, by name: cpu.py, cpu.py compiled by torch, `others`, and the Triton kernel."""
    plain = getattr(cpu, operation)
    compiled = {COMPILE: torch.compile(plain, dynamic=False)} if GPU else {}
    return {"torch": plain} | compiled | others | {"triton": getattr(triton_ops, operation)}


def cases(ways: dict[str, Callable], shapes: list = SHAPES) -> list[tuple]:
    """Way and shape of every benchmark. torch.compile takes seconds for each shape, so only the first shape has it."""
    return [(way, shape) for shape in shapes for way in ways if way != COMPILE or shape == shapes[0]]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def gram(d: int) -> Tensor:
    """Gram matrix (d, d) of random inputs."""
    X = normal(TOKENS, d)
    return cpu.mirror_lower(cpu.gram_accumulate(torch.zeros(d, d, device=DEVICE), X))


def row_state(
    W: Tensor, diag: Tensor, M: Tensor, R: Tensor, U: Tensor, V: Tensor, E: Tensor, k: int, **options
) -> RowState:
    """A state whose vectors are made here."""
    eta, error = torch.empty(2, len(W), device=W.device).unbind()
    return RowState(W, diag, M, R, U, V, E, k, eta, error, **options)


def numbers(way: str, **values: float) -> dict[str, float | Tensor]:
    """The scalars of a step: tensors for the Triton kernel on a GPU, as in a solve; floats for other ways."""
    stored = GPU and way == "triton"
    return {name: torch.tensor(value, device=DEVICE) if stored else value for name, value in values.items()}


def budget(pattern: str, d: int) -> tuple[int, int, int]:
    """(k, group, d), with d rounded down to a multiple of 4. "rows" keeps 0.4 of a row, "2:4" keeps 2 of every 4."""
    d -= d % 4
    return (int(0.4 * d), 0, d) if pattern == "rows" else (2, 4, d)


def measure(
    benchmark, run: Callable, cost: Cost, *, unit: str | None = None, setup: Callable[[], tuple] = tuple
) -> None:
    """Time `run(*setup())`, and record its least flops and bytes.

    On a GPU the timer is `Moment` (see conftest.py), and the GPU is busy while the host prepares the launches.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: the operation.
        cost: least work of one call.
        unit: precision of the products whose roof bounds the flops; None for operations bound by bytes.
        setup: returns fresh arguments before every call, untimed.
    """
    device = torch.cuda.get_device_name() if GPU else "cpu, Triton's interpreter"
    benchmark.extra_info |= {"flops": cost.flops, "bytes": cost.bytes, "unit": unit}
    benchmark.extra_info |= {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    seconds = 0.0

    def prepare() -> tuple[tuple, dict]:
        arguments = setup()
        keep_busy()
        return arguments, {}

    if GPU:
        # The first call compiles. The second says how long a call takes.
        run(*setup())
        arguments = setup()
        started = Moment()
        run(*arguments)
        seconds = Moment() - started
    benchmark.pedantic(run, setup=prepare, rounds=rounds_of(seconds), warmup_rounds=1)


def assert_equal_enough(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The check before a timing; the tolerance is relative to the largest expected value."""
    # In parts, since float64 copies of the largest matrices would not fit.
    parts = list(zip(got.split(1024), expected.split(1024), strict=True))
    difference = max((a.double() - b.double()).abs().max().item() for a, b in parts)
    assert difference <= tolerance * expected.abs().max().item(), f"differs by {difference}"
