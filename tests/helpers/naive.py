"""The specification of the kernels: the reference of each operation by its name, from the file of the operation.

Nothing here is meant to be fast. With float64 tensors a reference computes in float64, so that tests can take it for
the truth; else it computes in fp32.
"""

from collections.abc import Callable
from functools import partial

from sparsefw.kernels import rounding, triton_ops  # noqa: F401, which fills OPERATIONS
from sparsefw.kernels.operation import OPERATIONS


def __getattr__(name: str) -> Callable:
    if name not in OPERATIONS:
        raise AttributeError(name)
    return OPERATIONS[name].reference


round_mask = partial(rounding.round_mask, OPERATIONS["lmo"].reference)
