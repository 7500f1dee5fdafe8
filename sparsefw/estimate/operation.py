"""An operation, and the cost of all its calls together."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsefw.kernels.cost import Cost


@dataclass(frozen=True)
class Operation:
    """All calls of an operation in a block.

    Attributes:
        phase: "calibrate", "exchange", "solve", "reconstruct", "forward" or "evaluate".
        name: name of the operation, or of the layer whose product it is.
        unit: unit that multiplies: "bf16", "tf32" or "ieee" (fp32).
        calls: number of calls.
        cost: cost of all calls together.
    """

    phase: str
    name: str
    unit: str
    calls: int
    cost: Cost


def split(cost_of: Callable[[int], Cost], amount: int, calls: int) -> Cost:
    """The cost of rows or tokens that are shared out over several calls.

    Args:
        cost_of: the cost of one call with a given number of rows or tokens. Each call moves the bytes of `cost_of(0)`.
        amount: number of rows or tokens in all calls.
        calls: number of calls.
    """
    whole, fixed = cost_of(amount), cost_of(0)
    return Cost(whole.flops, whole.bytes + (calls - 1) * fixed.bytes)


def times(cost: Cost, calls: int) -> Cost:
    """The cost of several calls that cost the same."""
    return Cost(calls * cost.flops, calls * cost.bytes)
