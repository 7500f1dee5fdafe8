"""Choose a placement: the fastest one that fits the memory limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sparsefw import memory
from sparsefw.errors import InputError, counted, option
from sparsefw.estimate.memory import GIB, MemoryNeeds, kept_widths, memory_needs, recovery_needs, state_bytes
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.inputs import Inputs
from sparsefw.memory import Limits
from sparsefw.model.activations import BATCH_TOKENS, HELD_OUT, LEAST_STEPS, PLACES, SOLVER, Placement
from sparsefw.ranks import ALONE, Ranks
from sparsefw.solver.config import default_recovery
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT

# Tokens in a micro-batch that keep a GPU busy. Fewer are chosen only after every other saving but reading ahead.
BUSY_TOKENS = 4096


# The largest batch of windows that a model generates as its own calibration text.
MOST_GENERATED = 64


def memory_limits(gpu_memory: float | None, host_memory: float | None, free: Limits, ranks: Ranks = ALONE) -> Limits:
    """Find the memory limits of a process in bytes: "host", and with a GPU "gpu". All ranks get the lowest limits.

    Args:
        gpu_memory, host_memory: limits of the user, in GiB; None: nine tenths of the free memory.
        free: bytes of free memory, see `memory.free_memory`.
        ranks: the processes of the run; those on one machine share its memory.

    Raises:
        InputError: the user gives more than the GPU's free memory, or there is no GPU.
    """
    if gpu_memory is not None and gpu_memory * GIB > (room := free.get("gpu", 0)):
        of_card = f"the GPU has {memory.gib(room)} GiB free" if room else "no CUDA device"
        asked = option("gpu_memory", gpu_memory)
        raise InputError(f"{asked}: {of_card}; a plan for another machine names its card (--gpu)")
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
    limits: Limits,
    folder: Path | None = None,
    fixed: dict[str, Any] | None = None,
) -> Placement:
    """Choose the fastest placement that fits the memory limits.

    Args:
        shape: shape of the model.
        workload: the work.
        limits: memory limits of a rank in bytes: "host", and with a GPU "gpu".
        folder: folder for activations in a file.
        fixed: fields of `Placement` whose values are already chosen.

    Raises:
        InputError: no placement fits; the message names the smallest limit that could be enough.
    """
    tried = []
    for placement in _placements(shape, workload, folder, fixed or {}):
        tried.append(memory_needs(shape, workload, placement))
        if fits(tried[-1], limits):
            return placement
    remedy = f"fewer or shorter windows ({option('nsamples')}, {option('seqlen')})"
    if workload.config.reconstruct:
        remedy += f", or {option('reconstruct', 0)}"
    raise too_little(tried, limits, remedy, workload.ranks_here)


@dataclass(frozen=True)
class RecoveryPlan:
    """The recovery of a run.

    Attributes:
        tokens: number of tokens; 0: there is no recovery.
        seqlen: tokens in a window.
        needs: the memory that it takes.
        refused: why there is no recovery although the config does not rule it out; None: there is no such reason.
        asked: whether the user has asked for a recovery; else it is the default.
        reruns: whether blocks run again in the backward, since their graphs do not fit together.
    """

    tokens: int = 0
    seqlen: int = 0
    needs: MemoryNeeds = field(default_factory=partial(MemoryNeeds, {}))
    refused: InputError | None = None
    asked: bool = False
    reruns: bool = False


def plan_recovery(shape: ModelShape, workload: Workload, limits: Limits) -> RecoveryPlan:
    """Plan the recovery of a run. Blocks run again in the backward if their graphs do not fit; arguments as `place`."""
    config, tried = workload.config, list[MemoryNeeds]()
    if not shape.logits_itemsize or config.recover == 0:
        return RecoveryPlan()
    tokens = config.recover or default_recovery(workload.windows, workload.seqlen)
    for reruns in (False, True):
        tried.append(recovery_needs(shape, workload, reruns))
        if fits(tried[-1], limits):
            return RecoveryPlan(tokens, workload.seqlen, tried[-1], reruns=reruns)
    return RecoveryPlan(refused=too_little(tried, limits, f"prune without it ({option('recover', 0)})"))


def notes_of_recovery(plan: RecoveryPlan, recover: int | None, hours: float | None) -> list[str]:
    """Return a note that there is no recovery; empty if there is one, or the config rules it out.

    Raises:
        InputError: the user asks for one, by its tokens or its hours.
    """
    if recover == 0 and hours is not None:
        raise InputError(f"{option('hours', hours)}: ends a recovery, but there is none; give {option('recover')}")
    if not plan.refused:
        return []
    if recover or hours is not None:
        flag = option("recover", recover) if recover else option("hours", hours)
        raise InputError(f"{flag}: {plan.refused}")
    return [f"no recovery of the whole model: {plan.refused}"]


def generation_batch(shape: ModelShape, workload: Workload, limits: Limits, inputs: Inputs) -> int:
    """Choose how many windows of calibration text the dense model generates in a batch; 0: it generates no text.

    Raises:
        InputError: not one window fits, since the whole model has to be in memory.
    """
    if inputs.own is None:
        return 0
    batch = min(MOST_GENERATED, 1 << (inputs.nsamples - 1).bit_length())
    while True:
        phases = memory_needs(shape, replace(workload, generated=batch), Placement(1)).phases
        needs = MemoryNeeds({"generate": phases["generate"]})
        if fits(needs, limits):
            return batch
        if batch == 1:
            remedy = f"another text than {option('dataset', inputs.own)}, which the whole model in memory would write"
            raise too_little([needs], limits, remedy, workload.ranks_here)
        batch //= 2


def fits(needs: MemoryNeeds, limits: Limits) -> bool:
    """Tell whether the peaks of a run stay within its limits."""
    return needs.gpu <= limits.get("gpu", 0) and needs.host <= limits["host"]


def too_little(tried: Sequence[MemoryNeeds], limits: Limits, remedy: str, ranks_here: int = 1) -> InputError:
    """Make the error for limits that are too low. It names the smallest limit that could be enough.

    Args:
        tried: the needs of each placement that was tried; no placement fits.
        limits: as for `place`.
        remedy: what the user can do besides giving more memory, in words.
        ranks_here: ranks on this machine, which share the user's limit for the host.
    """
    what = "gpu" if min(needs.gpu for needs in tried) > limits.get("gpu", 0) else "host"
    least = min(getattr(needs, what) for needs in tried if what == "gpu" or needs.gpu <= limits.get("gpu", 0))
    among = ranks_here if what == "host" else 1
    # Rounded up, because the same process takes a little more or less memory each time.
    enough = math.ceil(100 * among * (least / GIB + 0.01)) / 100
    limit = option(f"{what}_memory", float(memory.gib(among * limits.get(what, 0))))
    kind = f"{what.replace('gpu', 'GPU')} memory{f' for {among} ranks' if among > 1 else ''}"
    return InputError(f"{limit}: this run needs at least {enough:.2f} GiB of {kind}; give more, or {remedy}")


def placement_words(placement: Placement, gpu: bool, one: str = "window") -> str:
    """Write a placement for the plan and for the log; `one` is the noun for a part of a micro-batch."""
    step = f", {placement.step} in a step" if placement.step else ""
    where = f"; activations: {placement.place}" if gpu or placement.place != "host" else ""
    ahead = "" if placement.ahead else "; nothing read ahead"
    kept = f"; inputs of up to {placement.kept_width} entries kept" if placement.kept_width else ""
    solver = memory.gib(placement.solver)
    return f"{counted(placement.batch, one)} at a time{step}, solves in {solver} GiB{where}{ahead}{kept}"


def _placements(shape: ModelShape, workload: Workload, folder: Path | None, fixed: dict[str, Any]) -> list[Placement]:
    """List all placements, the fastest first."""
    config, gpu = workload.config, workload.gpu
    batch = step = max(1, BATCH_TOKENS["gpu" if gpu else "cpu"] // workload.seqlen)
    # Micro-batches of several steps save time on a GPU only.
    divided = config.reconstruct and gpu and shape.divisible
    if config.reconstruct:
        step = max(1, min(batch, workload.windows // LEAST_STEPS))
        # A micro-batch has at most a sixteenth of the windows, so that a sixteenth can be held out.
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
    # Inputs are not kept in a file: reading one from the disk is no faster than computing it again.
    found = [
        replace(x, step=step if divided and step < x.batch else 0)
        for x in found
        if x.place != "file" or not x.kept_width
    ]
    few = max(1, BUSY_TOKENS // workload.seqlen)

    def cost(x: Placement) -> tuple[int, ...]:
        """Return the sort key of a placement: its first field is given up last."""
        batch, place, kept, solver = -x.batch, PLACES.index(x.place), -x.kept_width, -x.solver
        if gpu:
            return not x.ahead, max(batch, -few), kept, solver, place, batch
        return batch, place, kept, not x.ahead, solver

    return sorted(found, key=cost)
