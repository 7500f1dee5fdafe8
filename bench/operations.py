"""What the benchmarks share: shapes, inputs, the correctness gate and how a time is taken.

On a GPU the shapes are those of Llama-3.1-8B; without one they are tiny, and the Triton kernels run in the
interpreter, whose times say nothing about a GPU.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from sparsefw.kernels import fused, reference
from sparsefw.kernels.cost import Cost

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OPS = {"torch": reference, "triton": fused}
# (rows, d) of q_proj, gate_proj and down_proj.
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)] if GPU else [(48, 96), (40, 131)]
TOKENS = 4096 if GPU else 100
PRECISION = "tf32" if GPU else "ieee"
WEIGHT = torch.bfloat16 if GPU else torch.float32


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gram(d: int) -> Tensor:
    """Gram matrix (d, d) of random inputs."""
    X = normal(TOKENS, d)
    return reference.gram_accumulate(torch.zeros(d, d, device=DEVICE), X)


def budget(pattern: str, d: int) -> tuple[int, int, int]:
    """k, group and the width, at most d, that both patterns divide: "rows" keeps 0.4 of a row, "2:4" 2 of every 4."""
    d -= d % 4
    return (int(0.4 * d), 0, d) if pattern == "rows" else (2, 4, d)


def measure(benchmark, run: Callable, cost: Cost, *, setup: Callable[[], tuple] = tuple) -> None:
    """Time `run(*setup())`, and record what the operation has to do at least.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: the operation.
        cost: of one call.
        setup: gives fresh arguments before every call, untimed.
    """

    def timed(*arguments: object) -> None:
        run(*arguments)
        if GPU:
            torch.cuda.synchronize()

    benchmark.extra_info |= {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "device": torch.cuda.get_device_name() if GPU else "cpu, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rounds = 50 if GPU else 3
    benchmark.pedantic(timed, setup=lambda: (setup(), {}), rounds=rounds, warmup_rounds=5 if GPU else 1)


def assert_equal_enough(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The gate before a timing: no speed for a wrong kernel. Relative to the largest expected value."""
    difference = (got.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * expected.double().abs().max().item(), f"differs by {difference}"
