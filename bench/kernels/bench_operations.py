"""Check every provider of each operation, by setting and shape, and time it. `python -m bench` compares them."""

from dataclasses import replace

import pytest
import torch
from measure import TINY, Case, functions, size_of
from timing import GPU

from sparsefw.kernels.operation import OPERATIONS

# On a GPU projections of 8B (q, down) and of 70B (q, and some rows of down).
LLAMA = [size_of(*shape, 8192, "bfloat16") for shape in ((4096, 4096), (4096, 14336), (8192, 8192), (4096, 28672))]
SIZES = LLAMA if GPU else [TINY, replace(TINY, rows=40, d=132)]
CASES = [
    pytest.param(operation, label, size, provider, id=f"{operation.name} {label} {size.rows}x{size.d} {provider}")
    for operation in OPERATIONS.values()
    for label in operation.settings
    for size in SIZES
    for provider in functions(operation)
    # torch's compiler takes seconds for each size.
    if provider != "compile"
]


@pytest.mark.parametrize(("operation", "label", "size", "provider"), CASES)
def test_operation(timed, benchmark, operation, label, size, provider):
    benchmark.group = f"{operation.name} {label} {size.rows}x{size.d}"
    run = functions(operation)[provider]
    with torch.no_grad():
        try:
            case = Case(operation, label, size)
            _, wrong = case.check(run)
        except torch.OutOfMemoryError as error:
            wrong = str(error)
        if "out of memory" in (wrong or ""):
            pytest.skip(f"not enough GPU memory: {wrong}")
        assert not wrong
        timed(run, case.fresh, case.cost)
