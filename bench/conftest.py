"""Time benchmarks on a GPU by events in the GPU's queue."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # pytest's main process collects nothing with `-n`, so it does not wait for torch.
    from operations import Operation


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest list the benchmarks that it skips, and why."""
    config.option.reportchars += "s"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the GPU time its benchmarks."""
    from timing import GPU, Moment

    for item in items:
        if GPU:
            item.add_marker(pytest.mark.benchmark(timer=Moment))


@pytest.fixture
def measure(benchmark) -> Callable[["Operation", str], None]:
    """Compare a way of an operation with torch's, time it, and record its least flops and bytes."""
    import torch
    import triton
    from timing import GPU, Moment, keep_busy, rounds_of

    def measure(operation: "Operation", way: str) -> None:
        if way != "torch":
            operation.check(operation.result(way), operation.result("torch"))
        device = torch.cuda.get_device_name() if GPU else "cpu, Triton's interpreter"
        benchmark.extra_info |= {"flops": operation.cost.flops, "bytes": operation.cost.bytes, "unit": operation.unit}
        benchmark.extra_info |= {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        run, seconds = operation.ways[way], 0.0

        def prepare() -> tuple[tuple, dict]:
            arguments = operation.fresh()
            keep_busy()
            return arguments, {}

        if GPU:
            arguments = operation.fresh()
            started = Moment()
            run(*arguments)
            seconds = Moment() - started
            # Their memory is free before the next arguments are made.
            del arguments
        benchmark.pedantic(run, setup=prepare, rounds=rounds_of(seconds), warmup_rounds=1)

    return measure
