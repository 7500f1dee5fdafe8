"""On a GPU, benchmarks are timed by events in the GPU's queue."""

import pytest
from timing import GPU, Moment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU:
            item.add_marker(pytest.mark.benchmark(timer=Moment))
