"""Check every provider of each operation, and time it by pytest-benchmark, grouped by operation, setting and shape.

CI runs this at tiny sizes, without timing. `python -m bench` is for reading: it compares providers with each other and
with the machine's roofs.
"""

from time import perf_counter

import pytest
import torch
from measure import TINY, Case, functions, size_of
from timing import GPU, cool

from sparsefw.kernels.operation import OPERATIONS

# On a GPU projections of Llama-3.1-8B (q, down) and of Llama-3-70B (q, and some rows of down).
LLAMA = (4096, 4096), (4096, 14336), (8192, 8192), (4096, 28672)
SIZES = [size_of(*shape, 8192, "bfloat16") for shape in LLAMA] if GPU else [TINY, size_of(40, 132, 100, "float32")]


class Moment:
    """A point in the GPU's queue. The difference of two is the seconds between them."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def cases():
    """Yield the parameters of each case. torch's compiler is left out, since it takes seconds for each size."""
    for operation in OPERATIONS.values():
        for label in operation.settings:
            for size in SIZES:
                group = f"{operation.name} {label} {size.rows}x{size.d}"
                for provider in functions(operation).keys() - {"compile"} | {"triton"}:
                    yield pytest.param(operation, label, size, provider, group, id=f"{group} {provider}")


@pytest.mark.benchmark(timer=Moment if GPU else perf_counter)
@pytest.mark.parametrize(("operation", "label", "size", "provider", "group"), sorted(cases(), key=lambda case: case.id))
def test_operation(benchmark, operation, label, size, provider, group):
    benchmark.group = group
    run = operation.run if provider == "triton" else functions(operation)[provider]
    with torch.no_grad():
        case = Case(operation, label, size)
        wrong = case.check(run)[1]
        if wrong and "out of memory" in wrong:
            pytest.skip(wrong)
        assert not wrong
        benchmark.extra_info |= vars(case.cost)

        def setup():
            arguments = case.fresh()
            if GPU:
                cool()
            return (), arguments

        benchmark.pedantic(run, setup=setup, rounds=20 if GPU else 3, warmup_rounds=1)
