"""The backends that tests compare with the specification."""

from functools import partial
from types import ModuleType

import pytest
import torch
from helpers.kernel_inputs import DEVICE

from sparsefw.kernels import bound, candidates, cpu, naive, removed, rounding, rows, triton_ops


@pytest.fixture(autouse=True)
def tf32_of_tensor_cores(monkeypatch):
    """On a GPU the specification cuts tf32 operands off, as tensor cores do. Triton's interpreter rounds them."""
    if DEVICE == "cuda":
        monkeypatch.setattr(naive, "_to_tf32", partial(naive._to_tf32, whole=torch.trunc))


@pytest.fixture(params=[cpu, triton_ops], ids=["cpu", "triton"])
def backend(request) -> ModuleType:
    """The operations of cpu.py and of triton_ops.py. Tests of kernels that work in chunks have their own fixture."""
    return request.param


@pytest.fixture(params=["cpu", "one chunk", "chunks"])
def row_backend(request, monkeypatch) -> ModuleType:
    """The same for kernels whose tiles are `row_tile`'s, with rows in one chunk, and in chunks of 64 columns."""
    if request.param == "chunks":
        for module in (bound, candidates, removed, rounding, rows):
            monkeypatch.setattr(module, "row_tile", lambda rows, d: dict(BLOCK_R=32, BLOCK_D=64))
    return cpu if request.param == "cpu" else triton_ops
