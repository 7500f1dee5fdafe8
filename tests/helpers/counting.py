"""Operations in torch that count how often they are called."""

from collections import Counter
from types import SimpleNamespace

from sparsefw.kernels import cpu
from sparsefw.kernels.backend import Backend

OPERATIONS = (
    "product",
    "row_step",
    "lmo",
    "round_mask",
    "row_swaps",
    "conjugate_step",
    "gram_accumulate",
    "mirror_lower",
    "cross_accumulate",
)


def counting() -> tuple[Backend, Counter]:
    """A torch backend in fp32, and a counter of calls by operation; flops of products are under "flops"."""
    seen = Counter()

    def counted(name):
        def call(*args, **kwargs):
            seen[name] += 1
            if name == "product":
                rows, d = args[0].shape
                seen["flops"] += 2 * rows * d * d
            return getattr(cpu, name)(*args, **kwargs)

        return call

    def product_transposed(E, C, *, precision):
        return operations.product(E, C.T, precision=precision)

    counted_operations = {name: counted(name) for name in OPERATIONS} | {"product_transposed": product_transposed}
    operations = SimpleNamespace(**(vars(cpu) | counted_operations))
    return Backend(operations, "ieee"), seen
