"""Time benchmarks on a GPU by events in the GPU's queue."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    # pytest's main process collects nothing with `-n`, so it does not wait for torch.
    from sparsefw.kernels.operation import Cost


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest list the benchmarks that it skips, and why."""
    config.option.reportchars += "s"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the GPU time its benchmarks."""
    from timing import GPU, Moment

    for item in items:
        if GPU:
            item.add_marker(pytest.mark.benchmark(timer=Moment))


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """Facts of the machine."""
    import machine

    return machine.describe()


@pytest.fixture
def timed(benchmark, facts) -> Callable[[Callable[..., object], Callable[[], dict[str, Any]], "Cost"], None]:
    """timed(run, setup, cost): time run(**setup()), and record its least flops and bytes."""
    from timing import GPU, keep_busy

    def timed(run: Callable[..., object], setup: Callable[[], dict[str, Any]], cost: "Cost") -> None:
        benchmark.extra_info |= facts | vars(cost)

        def prepare() -> tuple[tuple, dict[str, Any]]:
            arguments = setup()
            if GPU:
                keep_busy()
            return (), arguments

        benchmark.pedantic(run, setup=prepare, rounds=10 if GPU else 3, warmup_rounds=1)

    return timed
