"""A backend: the precision of every product, and errors as good as fp32's."""

from types import SimpleNamespace

import pytest
import torch
from helpers.families import first_is_fast
from helpers.kernel_inputs import DEVICE, gram, normal, uniform

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend, Terms
from sparsefw.kernels.definitions import PRECISIONS


@pytest.mark.parametrize(
    ("precision", "exact", "inputs"),
    [("ieee", "ieee", "ieee"), ("tf32x3", "tf32x3", "ieee"), ("tf32", "tf32x3", "tf32"), ("bf16", "tf32x3", "tf32")],
)
def test_the_precision_of_every_operation(precision, exact, inputs):
    seen = []

    def recorded(name):
        def call(*args, **options):
            seen.append((name, options["precision"]))
            return getattr(cpu, name)(*args, **options)

        return call

    products = {name: recorded(name) for name in ("product", "gram_accumulate", "cross_accumulate")}
    E, G, X, B = normal(5, 12), gram(12), normal(7, 12), torch.zeros(5, 12, device=DEVICE)
    backend = Backend(SimpleNamespace(**vars(cpu) | products), precision)
    backend.product(E, G)
    backend.errors(E, G)
    assert backend.gram_accumulate(G, X) is G
    assert backend.cross_accumulate(B, normal(7, 5), X) is B
    expected = [("product", precision), ("product", exact), ("gram_accumulate", inputs), ("cross_accumulate", inputs)]
    assert seen == expected


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_operand_is_smaller_only_where_the_product_is_the_same(precision, dtype):
    backend, X, G = Backend(cpu, precision), normal(5, 12, dtype=dtype), gram(12)
    operand = backend.operand(X)
    assert operand.dtype == (torch.bfloat16 if precision == "bf16" else dtype)
    assert operand is X or precision == "bf16"
    assert torch.equal(backend.product(operand, backend.operand(G)), backend.product(X, G))
    # Exact products take two terms of G for 16-bit weights on tensor cores.
    assert (backend.exact_operand(G, dtype) is G) == (precision in ("ieee", "tf32x3") or dtype == torch.float32)


@pytest.mark.parametrize("operations", [cpu, triton_ops], ids=["torch", "triton"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("kind", first_is_fast(["target", "written", "mask"]))
def test_errors_of_terms_are_those_of_float64(kind, precision, operations):
    """For removed and for written weights, and for fp32 targets.

    Inputs with a common part, weights of random sign: the terms of a row's error cancel, so its rounding is large
    beside it. These rows are within 2e-5, and their sum, in which roundings cancel, within 1e-6.
    """
    backend, W, G = Backend(operations, precision), normal(60, 300, dtype=torch.bfloat16), gram(300)
    T = W.float() if kind == "written" else W.float() + 0.1 * normal(60, 300, seed=2)
    kept = uniform(60, 300, seed=3) < 0.4
    Z = (T * kept * (1 + 0.1 * normal(60, 300, seed=4))).bfloat16().float()
    E = W * ~kept if kind == "mask" else T - Z
    exact = backend.exact_operand(G, torch.bfloat16)
    truth = (E.double() * (E.double() @ G.double())).sum(1)
    errors = backend.errors(E, exact).double()
    assert ((errors - truth).abs() <= 2e-5 * truth).all()
    assert (errors.sum() - truth.sum()).abs() <= 1e-6 * truth.sum()
    # The rounded matrix alone would not do.
    alone = backend.errors(E, Terms(exact.high, None)).double()
    assert ((alone - truth).abs() > 2e-4 * truth).any()
