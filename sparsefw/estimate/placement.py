"""The choice of a placement: the one that costs least time among those that fit the memory limits."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from sparsefw import memory
from sparsefw.data.text import SELF
from sparsefw.errors import InputError, option
from sparsefw.estimate.memory import GIB, MemoryNeeds, keepable_widths, memory_needs, solver_bytes
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.inputs import Inputs
from sparsefw.model import Placement
from sparsefw.model.activations import BATCH_TOKENS, HELD_OUT, LEAST_STEPS, PLACES, SOLVER
from sparsefw.ranks import ALONE, Ranks
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT

# Tokens in a micro-batch of which a GPU holds no fewer as long as there is something else to give up.
FEW = 4096

# Windows of its own text that a model writes at once, at most.
WRITTEN = 64


def memory_limits(
    gpu_memory: float | None, host_memory: float | None, free: dict[str, int], ranks: Ranks = ALONE
) -> dict[str, int]:
    """Memory limits of this process in bytes: "host", and with a GPU "gpu"; the lowest ones of all ranks.

    Args:
        gpu_memory, host_memory: limits that the user has given, in GiB; None: what is free, less a tenth.
        free: what is free, see `memory.free_memory`.
        ranks: the ranks on a machine share its memory.

    Raises:
        InputError: there is a limit for a GPU, and no GPU.
    """
    if gpu_memory is not None and "gpu" not in free:
        raise InputError(f"{option('gpu_memory')}: no CUDA device")
    given = {"gpu": gpu_memory, "host": host_memory and host_memory / ranks.here}
    limits = {
        what: int(size * (1 - memory.MARGIN) if (gib := given[what]) is None else gib * GIB)
        for what, size in free.items()
    }
    everywhere = ranks.gather(limits)
    return {what: min(other[what] for other in everywhere) for what in limits}


def place(
    shape: ModelShape,
    workload: Workload,
    limits: dict[str, int],
    folder: Path | None = None,
    fixed: dict[str, Any] | None = None,
) -> tuple[Placement, MemoryNeeds]:
    """The placement that costs least time among those that fit.

    Args:
        shape: shape of the model.
        workload: the work.
        limits: memory limits of a rank in bytes: "host", and with a GPU "gpu".
        folder: folder for activations in a file.
        fixed: values of `Placement` that are settled, by field.

    Raises:
        InputError: none fits; the message names the smallest limit that could.
    """
    tried = []
    for placement in _placements(shape, workload, folder, fixed or {}):
        needs = memory_needs(shape, workload, placement)
        if needs.gpu <= limits.get("gpu", 0) and needs.host <= limits["host"]:
            return placement, needs
        tried.append(needs)
    remedy = f"fewer or shorter windows ({option('nsamples')}, {option('seqlen')})"
    if workload.config.reconstruct:
        remedy += f", or {option('reconstruct', 0)}"
    for what in ("gpu", "host"):
        limit, least = limits.get(what, 0), min(getattr(needs, what) for needs in tried)
        if least > limit:
            raise too_little(what, limit, least, remedy, workload.ranks_here)
        tried = [needs for needs in tried if getattr(needs, what) <= limit]
    raise AssertionError("a placement fits each limit, and none fits both")


def too_little(what: str, limit: int, least: int, remedy: str, ranks_here: int = 1) -> InputError:
    """The refusal of a limit of "gpu" or "host" memory that is too low; all in bytes, and words that say what to do."""
    # The user's limit for the host is that of all ranks on a machine. Rounded up, so that what is named is enough
    # although the same process takes a little more or less each time.
    among = ranks_here if what == "host" else 1
    enough = math.ceil(100 * among * (least / GIB + 0.01)) / 100
    memory = f"{what.replace('gpu', 'GPU')} memory{f' for {among} ranks' if among > 1 else ''}"
    return InputError(
        f"{option(f'{what}_memory', round(among * limit / GIB, 2))}: this run needs at least {enough:.2f} GiB of "
        f"{memory}; give more, or {remedy}"
    )


def written_at_once(shape: ModelShape, workload: Workload, limits: dict[str, int], inputs: Inputs) -> int:
    """The windows of its own calibration text that the dense model writes at once; 0: the run calibrates on others.

    Raises:
        InputError: not one fits, since the whole model has to be in memory; the message names what needs less.
    """
    if SELF not in inputs.shares:
        return 0
    batch = min(WRITTEN, 1 << (inputs.nsamples - 1).bit_length())
    while batch:
        gpu, host = memory_needs(shape, replace(workload, written=batch), Placement(1)).phases["generate"]
        if gpu <= limits.get("gpu", 0) and host <= limits["host"]:
            return batch
        batch //= 2
    what, least = ("gpu", gpu) if gpu > limits.get("gpu", 0) else ("host", host)
    limit = option(f"{what}_memory", round(limits.get(what, 0) / GIB, 2))
    raise InputError(
        f"{limit}: to write its own text ({option('dataset', SELF)}) the whole model is held in memory, at least "
        f"{least / GIB + 0.01:.2f} GiB; give more, or a file or a dataset of the Hub, as {option('dataset', 'c4')}"
    )


def _placements(
    shape: ModelShape, workload: Workload, folder: Path | None, fixed: dict[str, Any]
) -> Iterator[Placement]:
    """All placements, those that cost least time first."""
    batch = step = max(1, BATCH_TOKENS["gpu" if workload.gpu else "cpu"] // workload.seqlen)
    # A CPU gains nothing by micro-batches of several steps.
    divided = workload.config.reconstruct and workload.gpu and shape.divisible
    if workload.config.reconstruct:
        step = max(1, min(batch, workload.windows // LEAST_STEPS))
        # A sixteenth of the micro-batches is held out.
        steps = min(batch, workload.windows // HELD_OUT) // step if divided else 1
        batch = step << max(0, steps.bit_length() - 1)
    widest = max((layer.d for block in shape.blocks for layer in block.layers), default=1)
    least = BYTES_PER_ENTRY * ROW_UNIT * widest
    choices: dict[str, Any] = {
        "batch": [batch >> n for n in range(batch.bit_length())],
        "place": PLACES if workload.gpu else PLACES[1:],
        "ahead": [True, False],
        "solver": sorted({max(least, solver_bytes(shape, workload, SOLVER >> n)) for n in range(8)}, reverse=True),
        "kept_width": sorted({0} | keepable_widths(shape, workload), reverse=True),
    }
    choices |= {name: [value] for name, value in fixed.items()}
    # The last of these is given up first.
    order = ("ahead", "kept_width", "solver", "place", "batch")
    if not workload.gpu:
        order = ("batch", "place", "kept_width", "ahead", "solver")
    found = [dict(zip(order, values, strict=True)) for values in product(*(choices[name] for name in order))]
    if workload.gpu:
        found.sort(key=lambda chosen: (not chosen["ahead"], -min(chosen["batch"], max(1, FEW // workload.seqlen))))
    for chosen in found:
        placement = Placement(folder=folder, step=step if divided and step < chosen["batch"] else 0, **chosen)
        # From a disk an input comes no sooner than the block makes it again.
        if placement.place != "file" or not placement.kept_width:
            yield placement
