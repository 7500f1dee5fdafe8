"""Operations as Triton kernels, for `--kernel triton`. They have the same names as in `cpu.py` and `packed_cpu.py`."""

# ruff: noqa: F401, since `backend` looks for these names in this module.

from .adam import adam_step
from .bound import bound_scores, bound_sums
from .candidates import candidates
from .conjugate import conjugate_step
from .cross import cross_accumulate
from .gram import gram_accumulate
from .lmo import lmo
from .mirror import mirror_lower
from .packed import packed_product, unpack
from .product import product, product_transposed
from .removed import begin_fit, removed
from .repeat import repeat
from .rounding import round_mask
from .rows import row_errors, take_rows
from .step import row_step
from .swaps import row_swaps
