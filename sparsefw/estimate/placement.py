"""Choose a placement: the one that costs least time among those that fit the memory limits."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from sparsefw import memory
from sparsefw.data.text import SELF
from sparsefw.errors import InputError, counted, option
from sparsefw.estimate.memory import GIB, MemoryNeeds, kept_widths, memory_needs, state_bytes
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.inputs import Inputs
from sparsefw.model import Placement
from sparsefw.model.activations import BATCH_TOKENS, HELD_OUT, LEAST_STEPS, PLACES, SOLVER
from sparsefw.ranks import ALONE, Ranks
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT

# Tokens in a micro-batch that keep a GPU busy. It has fewer only when nothing else is left to give up.
BUSY_TOKENS = 4096

# The most windows of its own text that a model writes at once.
MOST_GENERATED = 64


def memory_limits(
    gpu_memory: float | None, host_memory: float | None, free: dict[str, int], ranks: Ranks = ALONE
) -> dict[str, int]:
    """Find the memory limits of a process in bytes: "host", and with a GPU "gpu"; the lowest ones of all ranks.

    Args:
        gpu_memory, host_memory: limits of the user, in GiB; None: nine tenths of the free memory.
        free: bytes of free memory, see `memory.free_memory`.
        ranks: the ranks on a machine share its memory.

    Raises:
        InputError: there is a limit for a GPU, and no GPU.
    """
    if gpu_memory is not None and "gpu" not in free:
        raise InputError(f"{option('gpu_memory')}: no CUDA device")
    limits = {what: int(size * (1 - memory.MARGIN)) for what, size in free.items()}
    if gpu_memory is not None:
        limits["gpu"] = int(gpu_memory * GIB)
    if host_memory is not None:
        limits["host"] = int(host_memory / ranks.here * GIB)
    everywhere = ranks.gather(limits)
    return {what: min(other[what] for other in everywhere) for what in limits}


def place(
    shape: ModelShape,
    workload: Workload,
    limits: dict[str, int],
    folder: Path | None = None,
    fixed: dict[str, Any] | None = None,
) -> tuple[Placement, MemoryNeeds]:
    """Choose the placement that costs least time among those that fit.

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
        tried.append(memory_needs(shape, workload, placement))
        if fits(tried[-1], limits):
            return placement, tried[-1]
    remedy = f"fewer or shorter windows ({option('nsamples')}, {option('seqlen')})"
    if workload.config.reconstruct:
        remedy += f", or {option('reconstruct', 0)}"
    raise too_little(tried, limits, remedy, workload.ranks_here)


def generation_batch(shape: ModelShape, workload: Workload, limits: dict[str, int], inputs: Inputs) -> int:
    """Choose how many windows of its own calibration text the dense model writes at once; 0: it writes no text.

    Raises:
        InputError: not one window fits, since the whole model has to be in memory.
    """
    if SELF not in inputs.shares:
        return 0
    batch = min(MOST_GENERATED, 1 << (inputs.nsamples - 1).bit_length())
    while True:
        phases = memory_needs(shape, replace(workload, generated=batch), Placement(1)).phases
        needs = MemoryNeeds({"generate": phases["generate"]})
        if fits(needs, limits):
            return batch
        if batch == 1:
            remedy = f"another text than {option('dataset', SELF)}, which the whole model in memory would write"
            raise too_little([needs], limits, remedy, workload.ranks_here)
        batch //= 2


def fits(needs: MemoryNeeds, limits: dict[str, int]) -> bool:
    """Tell whether a run stays below its limits."""
    return needs.gpu <= limits.get("gpu", 0) and needs.host <= limits["host"]


def too_little(tried: Sequence[MemoryNeeds], limits: dict[str, int], remedy: str, ranks_here: int = 1) -> InputError:
    """Make the refusal of limits that are too low; it names the smallest limit that could be enough.

    Args:
        tried: the needs, none of which fits.
        limits: as for `place`.
        remedy: what else the user can do, in words.
        ranks_here: ranks on this machine, which share the user's limit for the host.
    """
    what = "gpu" if min(needs.gpu for needs in tried) > limits.get("gpu", 0) else "host"
    least = min(getattr(needs, what) for needs in tried if what == "gpu" or needs.gpu <= limits.get("gpu", 0))
    among = ranks_here if what == "host" else 1
    # Rounded up, so that it is enough although the same process takes a little more or less each time.
    enough = math.ceil(100 * among * (least / GIB + 0.01)) / 100
    limit = option(f"{what}_memory", round(among * limits.get(what, 0) / GIB, 2))
    kind = f"{what.replace('gpu', 'GPU')} memory{f' for {among} ranks' if among > 1 else ''}"
    return InputError(f"{limit}: this run needs at least {enough:.2f} GiB of {kind}; give more, or {remedy}")


def placement_words(placement: Placement, gpu: bool, one: str = "window") -> str:
    """Write a placement for the plan and for the log; `one` is what a micro-batch has several of."""
    step = f", {placement.step} in a step" if placement.step else ""
    where = f"; activations: {placement.place}" if gpu or placement.place != "host" else ""
    ahead = "" if placement.ahead else "; nothing read ahead"
    kept = f"; inputs of up to {placement.kept_width} entries kept" if placement.kept_width else ""
    solver = memory.gib(placement.solver)
    return f"{counted(placement.batch, one)} at a time{step}, solves in {solver} GiB{where}{ahead}{kept}"


def _placements(shape: ModelShape, workload: Workload, folder: Path | None, fixed: dict[str, Any]) -> list[Placement]:
    """List all placements, those that cost least time first."""
    config, gpu = workload.config, workload.gpu
    batch = step = max(1, BATCH_TOKENS["gpu" if gpu else "cpu"] // workload.seqlen)
    # A CPU gains nothing by micro-batches of several steps.
    divided = config.reconstruct and gpu and shape.divisible
    if config.reconstruct:
        step = max(1, min(batch, workload.windows // LEAST_STEPS))
        # A sixteenth of the micro-batches is held out.
        steps = min(batch, workload.windows // HELD_OUT) // step if divided else 1
        batch = step << max(0, steps.bit_length() - 1)
    widest = max((layer.d for block in shape.kinds for layer in block.layers), default=1)
    least, most = BYTES_PER_ENTRY * ROW_UNIT * widest, state_bytes(shape, workload)
    choices: dict[str, Any] = {
        "batch": {batch >> n for n in range(batch.bit_length())},
        "place": PLACES if gpu else PLACES[1:],
        "ahead": {True, False},
        "solver": {max(least, min(most, SOLVER >> n)) for n in range(8)},
        "kept_width": {0}.union(*(kept_widths(block, config) for block in shape.kinds)),
    }
    choices |= {name: {value} for name, value in fixed.items()}
    found = [
        Placement(folder=folder, **dict(zip(choices, values, strict=True))) for values in product(*choices.values())
    ]
    # From a disk an input comes no sooner than the block makes it again.
    found = [x for x in found if x.place != "file" or not x.kept_width]
    found = [replace(x, step=step if divided and step < x.batch else 0) for x in found]
    few = max(1, BUSY_TOKENS // workload.seqlen)

    def cost(x: Placement) -> tuple[int, ...]:
        """Order placements; what is first here is given up last."""
        batch, place, kept, solver = -x.batch, PLACES.index(x.place), -x.kept_width, -x.solver
        if gpu:
            return not x.ahead, max(batch, -few), kept, solver, place, batch
        return batch, place, kept, not x.ahead, solver

    return sorted(found, key=cost)
