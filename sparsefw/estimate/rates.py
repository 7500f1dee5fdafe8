"""Rates of a device: as the user gives them, as measured here, or as this project measured its card before."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from sparsefw.errors import InputError
from sparsefw.estimate.operation import Operation

# Memory of a card as it is sold, in 10^9 bytes. The chips hold a little more, which is left to the driver.
CARDS = {
    "a10": 24,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "a6000": 48,
    "b200": 180,
    "h100": 80,
    "h200": 141,
    "l4": 24,
    "l40s": 48,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "v100-32gb": 32,
}

# Bytes per second that a GPU sends to the others of its machine, assumed: nine tenths of what NVLink has in one
# direction, or four fifths of PCIe.
LINKS = {
    "a10": 25e9,
    "a100-40gb": 270e9,
    "a100-80gb": 270e9,
    "a6000": 25e9,
    "b200": 800e9,
    "h100": 400e9,
    "h200": 400e9,
    "l4": 25e9,
    "l40s": 25e9,
    "rtx3090": 25e9,
    "rtx4090": 25e9,
    "rtx5090": 50e9,
    "v100-32gb": 130e9,
}

# The same between machines, for each GPU: an adapter of 400 Gbit/s.
NETWORK = 50e9

# Roofs of cards as `bench/tables.py` finds them: "copy" in bytes per second, and by unit in flops per second.
MEASURED_ROOFS: dict[str, dict[str, float]] = {}

UNITS = ("bf16", "tf32", "ieee")

# Timed repetitions of a measurement, after one that is not timed; the fastest counts.
ROUNDS = 3
# Calls in a repetition. A GPU waits for the host to launch the first of them, but not for the others.
CALLS = {"cuda": 10, "cpu": 1}
# Bytes of the measured copy.
COPIED = 1 << 28
# Rows of the measured product, and its least and greatest width: enough to fill the device, and done in seconds.
SIZES = {"cuda": (8192, 4096, 16384), "cpu": (256, 1024, 4096)}


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Attributes:
        flops: flops per second, by unit.
        bandwidth: rate of its memory, bytes per second.
        disk: bytes per second, read or written; None: the disk costs no time.
        source: where flops and bandwidth come from.
    """

    flops: dict[str, float]
    bandwidth: float
    disk: float | None
    source: str

    def on_disk(self, amount: float) -> float:
        """Seconds to read or write so many bytes."""
        return amount / self.disk if self.disk else 0.0


@dataclass(frozen=True)
class Links:
    """Bytes per second that a rank sends.

    Attributes:
        inside: to others of its machine; None: not known.
        between: to other machines; None: there are none.
        assumed: names of those that the user has not given.
    """

    inside: float | None
    between: float | None
    assumed: tuple[str, ...] = ()

    @property
    def slowest(self) -> float | None:
        """The rate of a ring of all ranks; None: not known."""
        known = [rate for rate in (self.inside, self.between) if rate]
        return min(known, default=None)


def given(tflops: list[str], bandwidth: float | None, disk: float | None) -> Rates | None:
    """Rates from the command line; None if it names neither flops nor bandwidth.

    Args:
        tflops: "N" for all units, or "UNIT=N", in 10^12 flops per second.
        bandwidth, disk: bytes per second.

    Raises:
        InputError: a rate is not of this form or not positive, or only one of flops and bandwidth is given.
    """
    if not tflops and bandwidth is None:
        return None
    if not tflops or bandwidth is None:
        raise InputError("--tflops and --bandwidth: hours need both of them")
    flops: dict[str, float] = {}
    for text in sorted(tflops, key=lambda text: "=" in text):
        unit, _, number = text.rpartition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        if unit not in ("", *UNITS) or not 0 < rate < math.inf:
            raise InputError(f"--tflops {text}: expected a positive number, or one of {', '.join(UNITS)} = a number")
        flops |= dict.fromkeys([unit] if unit else UNITS, rate * 1e12)
    return Rates(flops, bandwidth, disk, "as given")


def measured(units: Iterable[str], d: int, device: torch.device, disk: float | None) -> Rates:
    """Rates of this machine's device: the library's product in every unit, and a copy in its memory.

    Operands are random: with constant operands a GPU draws less power, and its clock is higher than in a run.

    Args:
        units: units to measure, of UNITS.
        d: width of the product; SIZES bounds it.
        device: device to measure.
        disk: bytes per second, given by the user; it is not measured.
    """
    rows, least, greatest = SIZES[device.type]
    d, flops, before = min(max(d, least), greatest), {}, torch.backends.cuda.matmul.allow_tf32
    generator = torch.Generator(device).manual_seed(0)
    for unit in units:
        dtype = torch.bfloat16 if unit == "bf16" else torch.float32
        E, G = (torch.randn(n, d, generator=generator, device=device).to(dtype) for n in (rows, d))
        torch.backends.cuda.matmul.allow_tf32 = unit == "tf32"
        try:
            flops[unit] = 2 * rows * d * d / _fastest(partial(torch.mm, E, G), device)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.rand(COPIED // torch.float32.itemsize, generator=generator, device=device)
    target = torch.empty_like(source)
    # Read once, written once.
    bandwidth = 2 * COPIED / _fastest(partial(target.copy_, source), device)
    return Rates(flops, bandwidth, disk, "as measured here")


def known(card: str | None, disk: float | None) -> Rates | None:
    """Rates of a card that this project has measured; None for others."""
    if card not in MEASURED_ROOFS:
        return None
    flops = dict(MEASURED_ROOFS[card])
    return Rates(flops, flops.pop("copy"), disk, f"as measured on {card}")


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, in the fastest of several rounds."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS[device.type]):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / CALLS[device.type])
    return min(times[1:])


def seconds(operations: Iterable[Operation], rates: Rates) -> float:
    """Least seconds of operations one after another.

    Raises:
        InputError: the rate of a unit is not known.
    """
    total = 0.0
    for operation in operations:
        unit = operation.unit
        if unit not in rates.flops:
            raise InputError(f"--tflops: the run multiplies in {unit} too; give {unit}=N as well")
        total += operation.cost.seconds(rates.flops[unit], rates.bandwidth)
    return total
