"""Operations as Triton kernels, for `--kernel triton`. They have the same names as in `cpu`."""

# ruff: noqa: F401, since `backend` looks for these names in this module.

from functools import partial

from . import rounding
from .adam import adam_step
from .conjugate import conjugate_step
from .cross import cross_accumulate
from .gram import gram_accumulate
from .lmo import lmo
from .mirror import mirror_lower
from .packed import packed_product, unpack
from .product import product
from .repeat import repeat
from .step import row_step
from .swaps import row_swaps
from .take_rows import take_rows

round_mask = partial(rounding.round_mask, lmo)
