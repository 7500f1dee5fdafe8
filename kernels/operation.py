"""Describe operations, so that tests, benchmarks, compiler, profiler and docs need no list of their own.

The file of an operation has its formula, its `reference` in plain torch, its `cost`, an `example` of its arguments, its
configuration, its kernel, and its launcher. The decorator `operation` of the launcher puts all of them into OPERATIONS.
Import `triton_ops`, which imports every operation.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .definitions import RowState

# Targets for which launches are compiled.
NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
ALL = (*NVIDIA, "gfx942")
BULK, HOPPER = ("sm_90", "sm_100"), ("sm_90",)

Launcher = TypeVar("Launcher", bound=Callable[..., Any])
# Names and values of the arguments of a call.
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The least work of a call. Comparisons do not count as flops.

    Attributes:
        flops: number of arithmetic operations in floating point.
        bytes: bytes that pass between the chip and its memory. Each operand counts once, as if a cache held it for
            later reads.
        unit: the precision of the products whose roof bounds the flops, one of PRECISIONS; None: the bytes bound the
            time.
    """

    flops: int
    bytes: int
    unit: str | None = None

    def seconds(self, roofs: Mapping[str, float]) -> float:
        """Compute the least time of a call, in seconds.

        Args:
            roofs: bytes per second by the name "copy", and flops per second by the precision of products.
        """
        of_products = self.flops / roofs[self.unit] if self.unit else 0.0
        return max(of_products, self.bytes / roofs["copy"])


@dataclass(frozen=True)
class Size:
    """Sizes of an example, and the tensors of which examples consist. On the meta device tensors have no data.

    Attributes:
        rows, d: shape of the weight.
        tokens: number of inputs of a Gram or cross matrix.
        dtype: dtype of weights and inputs.
        device: device of all tensors.
    """

    rows: int
    d: int
    tokens: int = 2048
    dtype: torch.dtype = torch.bfloat16
    device: str = "meta"

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Draw standard normal numbers from a fixed seed."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

    def matrix(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Draw a matrix (rows, d)."""
        return self.normal(self.rows, self.d, dtype=dtype, seed=seed)

    def weight(self, *, seed: int = 0) -> Tensor:
        """Draw a weight (rows, d)."""
        return self.matrix(dtype=self.dtype, seed=seed)

    def mask(self, *, seed: int = 0) -> Tensor:
        """Draw a mask (rows, d) that keeps about 0.4 of the entries."""
        return self.matrix(seed=seed) > 0.25

    def gram(self) -> Tensor:
        """Make the Gram matrix (d, d) fp32 of random inputs."""
        X = self.normal(self.tokens, self.d, seed=7)
        return X.T @ X


class Launch(NamedTuple):
    """A launch that is compiled: its targets, its size, and the setting of its example."""

    targets: Sequence[str]
    size: Size
    setting: Arguments


def launch(
    targets: Sequence[str], rows: int = 4096, d: int = 4096, *, dtype: torch.dtype = torch.bfloat16, **setting: Any
) -> Launch:
    """Make a `Launch`."""
    return Launch(targets, Size(rows, d, dtype=dtype), setting)


@dataclass(frozen=True)
class Operation:
    """What other code needs to know of an operation.

    Attributes:
        run: the launcher of the Triton kernel.
        reference: the same function in plain torch, formula by formula. In float64 it computes the truth.
        cost: the least work of a call, from some of its arguments; on the meta device, too.
        example: arguments of a call, for a size and a setting.
        result: tensors by which two calls are compared, from the arguments after a call and the returned value.
        settings: settings of the example that are worth a benchmark, by a label.
        writes: names of the arguments that a call changes.
        tolerance: largest allowed error of a result against float64, relative to the largest value; None: by the
            precision of products.
        library: the same in one or two calls of torch's library; None: there is no such call.
        launches: launches that are compiled besides every setting at standard sizes, see bench/compiled.py.
    """

    run: Callable[..., Any]
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    example: Callable[..., Arguments]
    result: Callable[[Arguments, Any], tuple[Tensor, ...]]
    settings: Mapping[str, Arguments] = field(default_factory=lambda: {"": {}})
    writes: Sequence[str] = ()
    tolerance: float | None = 1e-5
    library: Callable[..., Any] | None = None
    launches: Sequence[Launch] = ()

    @property
    def name(self) -> str:
        """Name of the operation."""
        return self.run.__name__

    @property
    def does(self) -> str:
        """What it does, in a sentence."""
        return (inspect.getdoc(self.run) or "").splitlines()[0].partition(". ")[0].rstrip(".")

    def cost_of(self, arguments: Arguments) -> Cost:
        """Compute the least work of a call with these arguments."""
        return call_cost(self.cost, arguments)

    def fresh(self, arguments: Arguments) -> Arguments:
        """Copy the arguments that a call changes."""
        return arguments | converted({name: arguments[name] for name in self.writes})


OPERATIONS: dict[str, Operation] = {}


def operation(
    reference: Callable[..., Any],
    cost: Callable[..., Cost],
    example: Callable[..., Arguments],
    *,
    writes: Sequence[str] = (),
    **options: Any,
) -> Callable[[Launcher], Launcher]:
    """Put the decorated launcher into OPERATIONS, and return it unchanged.

    Arguments are as in `Operation`. By default `result` selects what a call writes, or else what it returns.
    """

    def result(arguments: Arguments, returned: Any) -> tuple[Tensor, ...]:
        return tuple(arguments[name] for name in writes) or (returned,)

    def register(run: Launcher) -> Launcher:
        given: Arguments = dict(result=result, writes=writes) | options
        OPERATIONS[run.__name__] = Operation(run, reference, cost, example, **given)
        return run

    return register


def converted(value: Any, convert: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Copy a tensor, or the tensors of a dict or of a state, by `convert`; return any other value."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, RowState):
        return RowState(**converted(vars(value), convert))
    return {name: converted(x, convert) for name, x in value.items()} if isinstance(value, dict) else value


def in_float64(arguments: Any) -> Any:
    """Copy arguments, with float64 in place of other floating tensors: in it a reference computes the truth."""
    return converted(arguments, lambda x: x.double() if x.is_floating_point() else x.clone())


def call_cost(cost: Callable[..., Cost], arguments: Arguments) -> Cost:
    """Call `cost` with those arguments that it names. Upper case counts as lower case, as for a kernel's arguments.

    Fields of a state count as arguments. A tensor descriptor stands for its tensor.
    """
    known: Arguments = {}
    for name, value in arguments.items():
        values = vars(value) if isinstance(value, RowState) else {name: getattr(value, "base", value)}
        known |= {key.lower(): x for key, x in values.items()}
    names = inspect.signature(cost).parameters
    return cost(**{name: known[name.lower()] for name in names if name.lower() in known})


def metadata(cost: Callable[..., Cost]) -> Callable[..., Arguments]:
    """Make the `launch_metadata` of a kernel, from which the profiler Proton takes its name, flops and bytes."""

    def describe(grid: Any, kernel: Any, arguments: Arguments) -> Arguments:
        found = call_cost(cost, arguments)
        width = "16" if found.unit == "bf16" else "32"
        return {"name": kernel.name, f"flops{width}": found.flops, "bytes": found.bytes}

    return describe
