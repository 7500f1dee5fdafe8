"""What the benchmarks share: shapes, inputs, ways to do an operation, the correctness gate and how a time is taken.

On a GPU the shapes are those of Llama-3.1-8B, Llama-3-70B and Llama-3.1-405B, in as many rows as one solve takes;
without one they are tiny, and the Triton kernels run in the interpreter, whose times say nothing about a GPU.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.cost import Cost

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# (rows, d): projections of 8B (q, down), of 70B (q, down) and of 405B (q, down).
LLAMA = [(4096, 4096), (4096, 14336), (8192, 8192), (4096, 28672), (4096, 16384), (2048, 53248)]
SHAPES = LLAMA if GPU else [(48, 96), (40, 131)]
TOKENS = 8192 if GPU else 100
PRECISION = "bf16" if GPU else "ieee"
WEIGHT = torch.bfloat16 if GPU else torch.float32
# What products of inputs, which are weights' type, run at.
UNIT = "bf16" if GPU else "ieee"

COMPILE = "torch.compile"

# Rounds of a timing: as many as fit in the seconds, but so many at least and at most.
SECONDS, ROUNDS = (0.3, (5, 50)) if GPU else (0.0, (3, 3))
# A fill of this many bytes before every round drives the inputs out of the cache.
FLUSH = 256 << 20


def ways(operation: str, **others: Callable) -> dict[str, Callable]:
    """The ways to do an operation by name: plain torch, compiled by torch, ours, and others."""
    plain = getattr(cpu, operation)
    compiled = {COMPILE: torch.compile(plain, dynamic=False)} if GPU else {}
    return {"torch": plain} | compiled | others | {"triton": getattr(triton_ops, operation)}


def cases(ways: dict[str, Callable], shapes: list = SHAPES) -> list[tuple]:
    """Way and shape of every benchmark. Compiling takes seconds a shape: torch.compile races at the first one only."""
    return [(way, shape) for shape in shapes for way in ways if way != COMPILE or shape == shapes[0]]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def gram(d: int) -> Tensor:
    """Gram matrix (d, d) of random inputs."""
    X = normal(TOKENS, d)
    return cpu.gram_accumulate(torch.zeros(d, d, device=DEVICE), X)


def numbers(way: str, **values: float) -> dict[str, float | Tensor]:
    """The numbers of a step as a way takes them: on a GPU ours are read when it runs, as in a solve."""
    stored = GPU and way == "triton"
    return {name: torch.tensor(value, device=DEVICE) if stored else value for name, value in values.items()}


def budget(pattern: str, d: int) -> tuple[int, int, int]:
    """k, group and the width, at most d, that both patterns divide: "rows" keeps 0.4 of a row, "2:4" 2 of every 4."""
    d -= d % 4
    return (int(0.4 * d), 0, d) if pattern == "rows" else (2, 4, d)


class Moment:
    """A point in the GPU's queue; two subtract to the seconds between them."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def record(benchmark, cost: Cost, *, unit: str | None = None, note: str = "") -> None:
    """Note beside a time what was done, and where."""
    benchmark.extra_info |= {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "unit": unit,
        "note": note,
        "device": torch.cuda.get_device_name() if GPU else "cpu, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def measure(
    benchmark, run: Callable, cost: Cost, *, unit: str | None = None, setup: Callable[[], tuple] = tuple
) -> None:
    """Time `run(*setup())`, and record what the operation has to do at least.

    On a GPU the timer is `Moment` (see conftest.py). The fill that empties the cache also keeps the GPU busy while the
    first launches are prepared, so that no wait for the host is timed.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: the operation.
        cost: of one call.
        unit: the precision whose products bound the flops; None where bytes alone are a bound worth a word.
        setup: gives fresh arguments before every call, untimed.
    """
    record(benchmark, cost, unit=unit)
    rounds, (least, most) = 0, ROUNDS
    flush = torch.empty(FLUSH if GPU else 0, dtype=torch.int8, device=DEVICE)

    def prepare() -> tuple[tuple, dict]:
        arguments = setup()
        flush.zero_()
        return arguments, {}

    if GPU:
        # Compiles, and says how long a call takes.
        run(*setup())
        arguments = setup()
        started = Moment()
        run(*arguments)
        rounds = SECONDS / (Moment() - started)
    benchmark.pedantic(run, setup=prepare, rounds=int(min(max(rounds, least), most)), warmup_rounds=1)


def assert_equal_enough(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The gate before a timing: no speed for a wrong kernel. Relative to the largest expected value."""
    # By parts: float64 copies of the largest matrices would not fit.
    parts = list(zip(got.split(1024), expected.split(1024), strict=True))
    difference = max((a.double() - b.double()).abs().max().item() for a, b in parts)
    assert difference <= tolerance * expected.abs().max().item(), f"differs by {difference}"
