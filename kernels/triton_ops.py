"""The Triton backend, which `--kernel triton` runs: the operations of naive.py under the same names, as in cpu.py."""

from .conjugate import conjugate_step
from .cpu import PRECISIONS, check_budget, round_operand
from .cross import cross_accumulate
from .gradient import gradient
from .gram import gram_accumulate
from .lmo import lmo
from .mirror import mirror_lower
from .product import product, product_transposed
from .repeat import repeat
from .step import row_step
from .swaps import row_swaps
from .update import convex_update

__all__ = [
    "PRECISIONS",
    "check_budget",
    "conjugate_step",
    "convex_update",
    "cross_accumulate",
    "gradient",
    "gram_accumulate",
    "lmo",
    "mirror_lower",
    "product",
    "product_transposed",
    "repeat",
    "round_operand",
    "row_step",
    "row_swaps",
]
