"""Every operation, by shape and setting, done in each way that there is: first compared, then timed."""

import math

import operations
import pytest
import torch
from operations import COMPILE, GPU, PEAKS, PRECISIONS, SHAPES, SHARE, TOKENS, memory_needed

WIDTHS = sorted({(d,) for _, d in SHAPES})
PATTERNS = [{}, {"group": 4}]
OURS = ("torch", "triton", *[COMPILE] * GPU)
# Each operation with its sizes, its settings, and the ways to do it.
OPERATIONS = [
    (operations.copy, [(1 << (30 if GPU else 16),)], [{}], ("torch",)),
    (operations.product, SHAPES, [{"precision": precision} for precision in PRECISIONS], (*OURS, "bare")),
    (operations.gram_accumulate, [(TOKENS, *width) for width in WIDTHS], [{}], (*OURS, "bare")),
    (operations.cross_accumulate, [(TOKENS, *shape) for shape in SHAPES], [{}], (*OURS, "bare")),
    (operations.mirror_lower, WIDTHS, [{}], OURS),
    (operations.lmo, SHAPES, PATTERNS, (*OURS, "topk")),
    (operations.row_step, SHAPES, PATTERNS, (*OURS, "topk")),
    (operations.iteration, SHAPES, [{"precision": "tf32"}, {"precision": "bf16"}], ("torch", "topk", "triton", "bare")),
    (operations.row_swaps, SHAPES, PATTERNS, ("torch", "triton")),
    (operations.conjugate_step, SHAPES, [{}], OURS),
    (operations.adam_step, SHAPES, [{}], OURS),
    (operations.packed_product, SHAPES, [{"batch": batch} for batch in (1, 4, 16)], ("torch", "triton", "bare")),
]
FREE = torch.cuda.mem_get_info()[0] if GPU else math.inf


def mark(name: str, size: tuple[int, ...], free: float) -> pytest.MarkDecorator:
    """Leave out what this many bytes of free memory do not hold."""
    need = memory_needed(name, size) if name in PEAKS else 0
    reason = f"{name} {size} needs {need / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free"
    return pytest.mark.skipif(need > SHARE * free, reason=reason)


# torch's compiler takes seconds for each size, so only the first size has it.
CASES = [
    pytest.param(
        *(make, size, setting, way),
        id=" ".join(map(str, (make.__name__, *size, *setting.values(), way))),
        marks=mark(make.__name__, size, FREE),
    )
    for make, sizes, settings, ways in OPERATIONS
    for setting in settings
    for size in sizes
    for way in ways
    if way != COMPILE or size == sizes[0]
]


@pytest.mark.parametrize(("make", "size", "setting", "way"), CASES)
def test_operation(measure, make, size, setting, way):
    measure(make(*size, **setting), way)
