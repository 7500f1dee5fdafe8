"""The choice of a placement: the one that costs least time among those that fit the memory limits."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from sparsefw.estimate.limits import first_that_fits
from sparsefw.estimate.memory import MemoryNeeds, keepable_widths, memory_needs
from sparsefw.estimate.workload import Workload
from sparsefw.model import Placement
from sparsefw.model.activations import PLACES
from sparsefw.model.placement import BATCH_TOKENS, LEAST_BATCHES, SOLVER
from sparsefw.model.shapes import ModelShape
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT


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
    choices = ((p, memory_needs(shape, workload, p)) for p in _placements(shape, workload, folder, fixed or {}))
    remedy = "fewer or shorter windows (--nsamples, --seqlen)"
    if workload.config.reconstruct:
        remedy += ", or --reconstruct 0"
    return first_that_fits(choices, limits, workload.ranks_here, remedy)


def _placements(
    shape: ModelShape, workload: Workload, folder: Path | None, fixed: dict[str, Any]
) -> Iterator[Placement]:
    """All placements, those that cost least time first."""
    batch = max(1, BATCH_TOKENS["gpu" if workload.gpu else "cpu"] // workload.seqlen)
    if workload.config.reconstruct:
        # Every micro-batch is a step.
        batch = max(1, min(batch, workload.windows_of_rank // LEAST_BATCHES))
    widest = max((layer.d for block in shape.blocks for layer in block.layers), default=1)
    least = BYTES_PER_ENTRY * ROW_UNIT * widest
    choices: dict[str, Any] = {
        "batch": [batch >> n for n in range(batch.bit_length())],
        "place": PLACES if workload.gpu else PLACES[1:],
        "ahead": [True, False],
        "solver": sorted({max(least, SOLVER >> n) for n in range(8)}, reverse=True),
        "kept_width": sorted({0} | keepable_widths(shape, workload), reverse=True),
    }
    choices |= {name: [value] for name, value in fixed.items()}
    # The last of these is given up first.
    order = ("ahead", "batch", "kept_width", "solver", "place")
    if not workload.gpu:
        order = ("batch", "place", "kept_width", "ahead", "solver")
    for values in product(*(choices[name] for name in order)):
        placement = Placement(folder=folder, **dict(zip(order, values, strict=True)))
        # From a disk an input comes no sooner than the block makes it again.
        if placement.place != "file" or not placement.kept_width:
            yield placement
