"""Step 3: row kernels at the chunks of real runs, and whether bits repeat."""

from collections.abc import Callable
from functools import partial

import torch
from gpu_lines import Part
from gpu_products import measure
from operations import TINY, Operation, adam_step, conjugate_step, gram_accumulate, lmo, product, row_step
from torch import Tensor

# (rows, d): chunks of a 70B run, and a layer of an 8B run.
CHUNKS = [(6528, 8192), (1856, 28672), (4096, 4096), (4096, 14336)]

REPEATS = 200

OPERATIONS: dict[str, Callable[[int, int], Operation]] = {
    "row step": row_step,
    "row step, fp32 with a gap to the target": partial(row_step, target_gap=True),
    "row step, 2:4": partial(row_step, group=4),
    "conjugate step": conjugate_step,
    "lmo": lmo,
    "adam step": adam_step,
}
# The Gram matrix is of as many tokens as there are rows.
REPEATED = OPERATIONS | {"product": product, "gram": gram_accumulate}


def row_kernels(part: Part) -> None:
    """Times of the row kernels, or of one of them, and their share of the bandwidth of a copy."""
    named = {name: make for name, make in OPERATIONS.items() if name.startswith(part.name.replace("_", " "))}
    for name, make in (named or OPERATIONS).items():
        for rows, d in TINY if part.tiny else CHUNKS:
            measure(part, make(rows, d), "triton", operation=name, rows=rows, d=d)


def repeats(part: Part) -> None:
    """Every operation again and again from one state; all results must have the same bits."""
    count = 3 if part.tiny else REPEATS
    for name, make in REPEATED.items():
        for rows, d in TINY[:1] if part.tiny else CHUNKS[:2]:
            part.add(operation=name, rows=rows, d=d, **differing(partial(make(rows, d).result, "triton"), count))


def differing(result: Callable[[], tuple[Tensor, ...]], count: int) -> dict[str, int]:
    """How many of so many results have other bits than the first, and how many entries differ at most."""

    def bits() -> list[Tensor]:
        # Compared as integers: NaN equals NaN, and -0.0 differs from 0.0.
        return [x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize]) for x in result()]

    first, wrong, most = bits(), 0, 0
    for _ in range(count - 1):
        entries = sum(int((a != b).sum()) for a, b in zip(bits(), first, strict=True))
        wrong, most = wrong + bool(entries), max(most, entries)
    return {"repeats": count, "runs_that_differ": wrong, "most_entries_that_differ": most}
