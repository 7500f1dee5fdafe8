"""The backends that tests compare with the specification."""

from types import ModuleType

import pytest

from sparsefw.kernels import cpu, triton_ops


@pytest.fixture(params=[cpu, triton_ops], ids=["cpu", "triton"])
def backend(request) -> ModuleType:
    """The operations of cpu.py and of triton_ops.py. Tests of kernels that work in chunks have their own fixture."""
    return request.param
