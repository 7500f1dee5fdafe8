"""Every operation is its reference, and has one cost: of a call, of a call without data, and of a launch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.kernel_inputs import DEVICE, PRODUCT_ERROR, SUM_ERROR
from triton.runtime.interpreter import InterpretedFunction

from sparsefw.kernels import accumulate, launch, triton_ops
from sparsefw.kernels.operation import OPERATIONS, Size, converted, in_float64

assert triton_ops  # It fills OPERATIONS.
CASES = [(name, label) for name, operation in OPERATIONS.items() for label in operation.settings]


@pytest.fixture
def launched(monkeypatch):
    """The kernels that the interpreter runs, with their arguments."""
    launches, run = [], InterpretedFunction.run

    def record(self, *args, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    # Bulk copies add to a small matrix, too.
    monkeypatch.setattr(accumulate, "ENOUGH", 1)
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "label"), CASES)
def test_an_operation_is_its_reference_at_its_cost(name, label, dtype, launched):
    operation, size = OPERATIONS[name], Size(24, 64, 40, dtype, DEVICE)
    setting = operation.settings[label]
    arguments = operation.example(size, **setting)
    cost = operation.cost_of(arguments)
    wide = in_float64(arguments)
    truth = operation.result(wide, operation.reference(**wide))
    tolerance = operation.tolerance
    if tolerance is None:
        # The interpreter, or a library, may read operands with more bits.
        tolerance = SUM_ERROR + PRODUCT_ERROR[cost.unit]
    for function in filter(None, (operation.run, operation.library)):
        given = converted(arguments)
        results = operation.result(given, function(**given))
        for got, exact in zip(results, truth, strict=True):
            assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and key not in operation.writes:
                assert torch.equal(given[key], value), f"{key} is not in `writes`"
    assert cost.bytes > 0
    assert cost == operation.cost_of(operation.example(replace(size, device="meta"), **setting))
    described = [(kernel, kernel.kwargs.get("launch_metadata"), given) for kernel, given in launched]
    assert described or not launch.INTERPRET
    assert all(describe for _, describe, _ in described)
    if len(described) == 1:
        [(kernel, describe, given)] = described
        width = 16 if cost.unit == "bf16" else 32
        expected = {"name": kernel.__name__, f"flops{width}": cost.flops, "bytes": cost.bytes}
        assert describe(None, SimpleNamespace(name=kernel.__name__), given) == expected
