"""Operations as Triton kernels, with the names of `cpu.py` and `packed_cpu.py`: `--kernel triton` runs them."""

# ruff: noqa: F401, `backend` looks for these names here.

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
