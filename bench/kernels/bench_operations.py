"""Compare the ways to do each operation, by shape and setting, and time them."""

import operations
import pytest
import torch
from operations import COMPILE, GPU, PRECISIONS, SHAPES, TOKENS

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
    (operations.row_step, SHAPES, PATTERNS, OURS),
    (operations.row_swaps, SHAPES, PATTERNS, ("torch", "triton")),
    (operations.conjugate_step, SHAPES, [{}], OURS),
    (operations.adam_step, SHAPES, [{}], OURS),
    (operations.packed_product, SHAPES, [{"batch": batch} for batch in (1, 4, 16)], ("torch", "triton", "bare")),
]
# torch's compiler takes seconds for each size, so only the first size has it.
CASES = [
    pytest.param(
        *(make, size, setting, way),
        id=" ".join(map(str, (make.__name__, *size, *setting.values(), way))),
    )
    for make, sizes, settings, ways in OPERATIONS
    for setting in settings
    for size in sizes
    for way in ways
    if way != COMPILE or size == sizes[0]
]


@pytest.mark.parametrize(("make", "size", "setting", "way"), CASES)
def test_operation(measure, make, size, setting, way):
    try:
        measure(make(*size, **setting), way)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"not enough GPU memory: {str(error).splitlines()[0]}")
