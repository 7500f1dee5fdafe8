"""Operations for `--kernel torch`, arranged for a CPU, under the same names as in `triton_ops`.

Most are plain torch. Selection and products with packed matrices are in C++ if it was compiled at installation.
"""

# ruff: noqa: F401, since `backend` looks for these names in this module.

from .packed import packed_product, unpack
from .products import cross_accumulate, gram_accumulate, mirror_lower, product
from .selection import lmo, round_mask
from .steps import adam_step, conjugate_step, repeat, row_step, take_rows
from .swaps import row_swaps
