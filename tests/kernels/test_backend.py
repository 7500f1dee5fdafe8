"""A backend: the precision of every product, errors as good as fp32's, and products of vertices."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SHAPES, gram, normal, uniform

from sparsefw.kernels import backend as module
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import KERNELS, PRECISIONS, TORCH, Backend, load_backend
from sparsefw.kernels.vertex_products import FIRST, REFRESH

OPERATIONS = pytest.mark.parametrize("operations", [cpu, triton_ops], ids=["torch", "triton"])


class Recorder:
    """Operations that record the precision and the operands' dtypes of every product and sum."""

    def __init__(self, operations):
        self.seen, self._operations = [], operations

    def __getattr__(self, name):
        operation = getattr(self._operations, name)

        def call(*args, **options):
            self.seen.append((name, options.get("precision"), *(x.dtype for x in args if isinstance(x, torch.Tensor))))
            return operation(*args, **options)

        return call


class TestPrecision:
    @pytest.mark.parametrize(
        ("precision", "exact", "inputs"),
        [
            ("ieee", "ieee", "ieee"),
            ("tf32x3", "tf32x3", "ieee"),
            ("tf32", "tf32x3", "tf32"),
            ("bf16", "tf32x3", "tf32"),
        ],
    )
    def test_of_every_operation(self, precision, exact, inputs):
        recorder, E, G, X = Recorder(cpu), normal(5, 12), gram(12), normal(7, 12)
        backend = Backend(recorder, precision)
        assert (backend.exact_precision, backend.input_precision) == (exact, inputs)
        backend.product(E, G)
        backend.exact_product(E, G)
        backend.errors(E, G)
        backend.gram_accumulate(torch.zeros_like(G), X)
        backend.cross_accumulate(torch.zeros(5, 12, device=DEVICE), normal(7, 5), X)
        assert [seen[:2] for seen in recorder.seen] == [
            ("product", precision),
            ("product", exact),
            ("product", exact),
            ("row_errors", None),
            ("gram_accumulate", inputs),
            ("cross_accumulate", inputs),
        ]

    def test_each_has_a_row_above(self):
        assert PRECISIONS == ("ieee", "tf32x3", "tf32", "bf16")

    @pytest.mark.parametrize("precision", ["fp32", "", None, "IEEE"])
    def test_unknown(self, precision):
        with pytest.raises(ValueError, match=f"precision: expected one of ieee, tf32x3, tf32, bf16, got {precision!r}"):
            Backend(cpu, precision)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_operand_is_smaller_only_where_the_product_is_the_same(self, precision, dtype):
        backend, X, G = Backend(cpu, precision), normal(5, 12, dtype=dtype), gram(12)
        operand = backend.operand(X)
        assert operand.dtype == (torch.bfloat16 if precision == "bf16" else dtype)
        assert operand is X or precision == "bf16"
        assert torch.equal(backend.product(operand, backend.operand(G)), backend.product(X, G))

    @OPERATIONS
    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    @pytest.mark.parametrize("kind", ["mask", "written", "target"])
    def test_errors_of_terms_are_those_of_float64(self, kind, precision, operations):
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
        assert isinstance(exact, module.Terms)
        truth = (E.double() * (E.double() @ G.double())).sum(1)
        errors = backend.errors(E, exact).double()
        assert ((errors - truth).abs() <= 2e-5 * truth).all()
        assert (errors.sum() - truth.sum()).abs() <= 1e-6 * truth.sum()
        # The rounded matrix alone would not do.
        alone = backend.errors(E, module.Terms(exact.high, None)).double()
        assert ((alone - truth).abs() > 2e-4 * truth).any()

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_terms_are_for_16_bit_weights_on_tensor_cores(self, precision):
        G = gram(12)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            operand = Backend(cpu, precision).exact_operand(G, dtype)
            assert (operand is G) == (precision in ("ieee", "tf32x3") or dtype == torch.float32)

    def test_terms_hold_16_bits(self):
        X = normal(37, 131) * 10.0 ** (20 * uniform(37, 131, seed=1) - 10)
        terms = module.split(X)
        assert ((terms.high.double() + terms.low.double() - X.double()).abs() <= 2.0**-16 * X.abs()).all()
        assert module.split(X.bfloat16()).low is None

    @OPERATIONS
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize(("rows", "d"), SHAPES)
    def test_errors_are_exact_whatever_the_precision(self, rows, d, precision, operations):
        E, G = normal(rows, d), gram(d)
        before = E.clone()
        errors = Backend(operations, precision).errors(E, G)
        truth = (E.double() * (E.double() @ G.double())).sum(1)
        assert errors.dtype == torch.float32
        # The sum of d terms of any sign, each with its own rounding.
        terms = (E.double() * (E.double().abs() @ G.double().abs())).abs().sum(1)
        assert ((errors.double() - truth).abs() <= 2e-6 * terms).all()
        assert torch.equal(E, before)

    def test_a_product_of_bf16_is_not_exact(self):
        """Without this the test above could not fail."""
        E, G = normal(37, 131), gram(131)
        terms = (E.double() * (E.double().abs() @ G.double().abs())).abs().sum(1)
        rough = (E * Backend(cpu, "bf16").product(E, G)).sum(1).double()
        truth = (E.double() * (E.double() @ G.double())).sum(1)
        assert not ((rough - truth).abs() <= 2e-6 * terms).all()


class TestOperations:
    @OPERATIONS
    def test_are_those_of_the_module(self, operations):
        backend = Backend(operations)
        for name in ("mirror_lower", "lmo", "row_step", "row_swaps", "conjugate_step", "repeat"):
            assert getattr(backend, name) is getattr(operations, name)

    def test_writes_where_it_is_told(self):
        out = torch.full((5, 12), torch.nan, device=DEVICE)
        assert TORCH.product(normal(5, 12), gram(12), out=out) is out
        assert torch.equal(out, cpu.product(normal(5, 12), gram(12)))

    def test_sums_in_place(self):
        G, B, X, D = gram(12), normal(5, 12), normal(7, 12), normal(7, 5)
        assert TORCH.gram_accumulate(G, X) is G
        assert TORCH.cross_accumulate(B, D, X) is B
        torch.testing.assert_close(G.tril(), (gram(12) + X.T @ X).tril())
        torch.testing.assert_close(B, normal(5, 12) + D.T @ X)

    def test_only_torch_may_run_in_several_threads(self):
        assert TORCH.thread_safe
        assert not Backend(triton_ops).thread_safe

    def test_equal_where_kernel_and_precision_are(self):
        assert TORCH == Backend(cpu, "ieee") != Backend(cpu, "tf32")
        with pytest.raises(dataclasses.FrozenInstanceError):
            TORCH.precision = "bf16"


class TestProductOfVertex:
    """Torch on a CPU adds the changes of the vertex; other backends multiply the whole of E."""

    def vertices(self, rows=9, d=33, count=FIRST + REFRESH):
        V = uniform(rows, d) < 0.4
        for n in range(count):
            V = V ^ (uniform(rows, d, seed=n + 1) < 0.1)
            yield V.clone()

    def products(self, backend, target_gap=None):
        """Each product with its float64 truth and the size of its terms."""
        W, G = normal(9, 33), gram(33)
        G_operand = backend.operand(G)
        V, out = torch.zeros(9, 33, dtype=torch.bool, device=DEVICE), torch.empty(9, 33, device=DEVICE)
        E = backend.operand(torch.empty(9, 33, device=DEVICE))
        multiply = backend.product_of_vertex(W, G_operand, target_gap, V=V, E=E, out=out)
        for vertex in self.vertices():
            removed = W * ~vertex + (0 if target_gap is None else target_gap)
            V.copy_(vertex)
            E.copy_(removed)
            assert multiply() is out
            yield out.double(), removed.double() @ G.double(), removed.double().abs() @ G.double().abs()

    @OPERATIONS
    @pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-6), ("bf16", 2**-7)])
    @pytest.mark.parametrize("gap", [False, True])
    def test_of_the_vertex_that_is_there_when_it_is_called(self, gap, precision, bound, operations):
        target_gap = 0.3 * normal(9, 33, seed=5) if gap else None
        for product, truth, terms in self.products(Backend(operations, precision), target_gap):
            assert ((product - truth).abs() <= bound * terms).all()

    @pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU torch makes every product; runs where there is no GPU")
    def test_torch_on_a_cpu_multiplies_only_at_the_start(self, monkeypatch):
        made, followed, products = Recorder(cpu), [], module.VertexProducts

        def spy(*args, **options):
            followed.append(options)
            return products(*args, **options)

        monkeypatch.setattr(module, "VertexProducts", spy)
        assert len(list(self.products(Backend(cpu, "tf32")))) == FIRST + REFRESH
        assert followed == [{"precision": "tf32"}]
        assert len(list(self.products(Backend(made, "tf32")))) == FIRST + REFRESH
        assert len(followed) == 1
        assert [seen[:2] for seen in made.seen] == [("product", "tf32")] * (FIRST + REFRESH)


class TestLoad:
    def test_every_kernel(self):
        assert load_backend("torch", "tf32") == Backend(cpu, "tf32")
        assert load_backend("triton", "bf16") == Backend(triton_ops, "bf16")
        assert set(KERNELS) == {"torch", "triton"}

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_has_every_operation(self, kernel):
        backend = load_backend(kernel, "ieee")
        for name in ("product", "gram_accumulate", "cross_accumulate", "lmo", "row_step", "row_swaps", "repeat"):
            assert callable(getattr(backend.operations, name))
        for name in ("removed", "row_errors", "take_rows", "candidates", "bound_scores", "bound_sums", "round_mask"):
            assert getattr(backend, name) is getattr(backend.operations, name)

    def test_unknown(self):
        with pytest.raises(KeyError):
            load_backend("cuda", "ieee")
        with pytest.raises(ValueError, match="precision"):
            load_backend("torch", "fp8")

    def test_torch_imports_no_triton(self, monkeypatch):
        seen = []
        monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=lambda *args: seen.append(args) or cpu))
        load_backend("torch", "ieee")
        assert seen == [(".cpu", "sparsefw.kernels")]
