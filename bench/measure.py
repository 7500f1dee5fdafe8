"""Measure an operation: check what each provider computes against float64, then time those that are right.

`__main__.py` tells which providers there are.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property, partial
from typing import Any

import torch
from timing import DEVICE, GPU, Stopwatch, race
from torch import Tensor
from torch.linalg import vector_norm

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.operation import Arguments, Operation, Size, in_float64

assert triton_ops  # It fills OPERATIONS.
PROVIDERS = ("ours", "torch", "compile", "library")
# Tolerances of products by precision, relative to the largest value.
PRECISIONS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
# Tensor cores cut off low bits of a sum, always towards 0. So a sum of squares is too small by up to this fraction for
# each of its terms.
CUT_OFF = 2.0**-26
# A tiny shape, for the interpreter.
TINY = Size(48, 96, tokens=100, dtype=torch.float32, device="cpu")


def functions(operation: Operation) -> dict[str, Callable[..., Any]]:
    """Return the functions of all providers that the operation has."""

    @cache
    def compiled() -> Callable[..., Any]:
        # torch's compiler takes seconds to import, so not before a call. It compiles for a few shapes, then gives up.
        torch.compiler.reset()
        return torch.compile(operation.reference, dynamic=False)

    made = {
        "ours": operation.run if GPU else getattr(cpu, operation.name, None),
        "torch": operation.reference,
        "compile": lambda **arguments: compiled()(**arguments),
        "library": operation.library,
    }
    return {name: function for name, function in made.items() if function}


def difference(got: Tensor, exact: Tensor) -> float:
    """Compute the largest difference, relative to the largest value."""
    if got.shape != exact.shape:
        return float("inf")
    # No further matrix is allocated: the largest ones fill a GPU.
    off, largest = (vector_norm(x.double(), torch.inf) for x in (got - exact, exact))
    return (off / largest.clamp(min=1e-30)).item()


class Case:
    """An operation at a setting and a size, with its inputs.

    Attributes:
        operation, setting, size: the operation, the label of its setting, and the size of its example.
        arguments: arguments of a call, which no call changes.
        cost: least work of a call.
    """

    def __init__(self, operation: Operation, setting: str, size: Size) -> None:
        self.operation, self.setting, self.size = operation, setting, size
        self.arguments = operation.example(size, **operation.settings[setting])
        self.cost = operation.cost_of(self.arguments)

    def fresh(self) -> Arguments:
        """Make the arguments of a call."""
        return self.operation.fresh(self.arguments)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """The result in float64."""
        arguments = in_float64(self.arguments)
        return self.operation.result(arguments, self.operation.reference(**arguments))

    def check(self, run: Callable[..., Any]) -> tuple[float | None, str | None]:
        """Call a function; returns the largest error of its result, and what is wrong with it, or None."""
        arguments = self.fresh()
        try:
            results = self.operation.result(arguments, run(**arguments))
        except Exception as problem:
            # A compiler that is missing, too little memory, or a bug: the others are measured all the same.
            return None, f"failed: {(str(problem).strip() or type(problem).__name__).splitlines()[0][:80]}"
        tolerance = self.operation.tolerance
        if tolerance is None:
            terms = max(self.size.tokens, self.size.d)
            tolerance = PRECISIONS[self.arguments.get("precision", "ieee")] + CUT_OFF * terms
        largest = 0.0
        for got, exact in zip(results, self.exact, strict=True):
            error = difference(got, exact)
            if not error <= tolerance:
                return error, f"wrong: error {error:.1e}, at most {tolerance:.0e} allowed"
            largest = max(largest, error)
        return largest, None

    @property
    def label(self) -> dict[str, Any]:
        """The part of a row that tells the case."""
        size = vars(self.size) | {"dtype": str(self.size.dtype).removeprefix("torch.")}
        del size["device"]
        return {"operation": self.operation.name, "setting": self.setting, **size}


def measure(
    case: Case, names: Iterable[str], roofs: Mapping[str, float], limit: float, base: Any
) -> list[dict[str, Any]]:
    """Measure a case; returns a row for each provider, as a file of results has it.

    Args:
        case: the case.
        names: names of providers.
        roofs: see `Cost.seconds`.
        limit: seconds of timing.
        base: times a call at another commit, see `base.Worker`; None: it is not measured.
    """
    cost, runs = case.cost, functions(case.operation)
    floor = cost.seconds(roofs) if cost.unit is None or cost.unit in roofs else None
    checks, timers = {}, {}
    for name in [name for name in names if name in runs]:
        # The first call also compiles.
        checks[name], timers[name] = case.check(runs[name]), Stopwatch(runs[name], case.fresh)
    if base:
        checks["base"], timers["base"] = (None, None), partial(base.time, **case.label)
        try:
            timers["base"]()
        except RuntimeError as problem:
            checks["base"] = None, f"failed: {problem}"
    # Its memory is free for the calls that are timed.
    vars(case).pop("exact", None)
    found = race({name: timer for name, timer in timers.items() if not checks[name][1]}, limit)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    rows = []
    for name, (error, wrong) in checks.items():
        own, seconds = medians.get(name), sorted(found.get(name, []))
        # The base is no rival: noise against it would look like a loss. Its own rival is ours.
        rivals = {"ours"} if name == "base" else {*medians} - {name, "base"}
        others = [medians[rival] for rival in rivals & {*medians}]
        result = dict(
            provider=name,
            error=error,
            wrong=wrong,
            seconds=own,
            low=own and seconds[len(seconds) // 5],
            high=own and seconds[-1 - len(seconds) // 5],
            rounds=len(seconds),
            late=getattr(timers[name], "late", 0),
            share=own and floor and floor / own,
            speedup=min(others) / own if own and others else None,
        )
        rows.append(case.label | vars(cost) | result)
    return rows


def size_of(rows: int, d: int, tokens: int, dtype: str) -> Size:
    """Make a size on this machine's device; `dtype` is a name as of a row."""
    return Size(rows, d, tokens, getattr(torch, dtype), DEVICE)
