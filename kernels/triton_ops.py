"""The Triton backend, which `--kernel triton` runs: the operations of naive.py under the same names, as in cpu.py."""

from .bound import bound_scores, bound_sums
from .candidates import candidates
from .conjugate import conjugate_step
from .cpu import PRECISIONS, check_budget, round_operand
from .cross import cross_accumulate
from .gradient import gradient
from .gram import gram_accumulate
from .lmo import lmo
from .mirror import mirror_lower
from .product import product, product_transposed
from .removed import begin_fit, removed
from .repeat import repeat
from .rounding import round_mask
from .rows import row_errors, take_rows
from .step import row_step
from .swaps import row_swaps
from .update import convex_update

__all__ = [
    "PRECISIONS",
    "begin_fit",
    "bound_scores",
    "bound_sums",
    "candidates",
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
    "removed",
    "repeat",
    "round_mask",
    "round_operand",
    "row_errors",
    "row_step",
    "row_swaps",
    "take_rows",
]
