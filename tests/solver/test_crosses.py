"""Cross matrices by the three forms that calibration measures: all give the same targets."""

import itertools

import pytest
import torch
from helpers.kernel_inputs import generator, normal
from helpers.layer_inputs import ERRORS, PATTERNS, ROWS, D, assert_same, make_config, run

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT
from sparsefw.solver.target import Cross, cross_rows

FORMS = ("inputs", "streams", "outputs")
TOKENS = 200


class Case:
    """Layers of one input that lose by what was pruned before them, in float64.

    Every layer adds W X to the stream h. The dense model's stream behind it is S = h + W X_dense, so the layer's output
    falls short by D = W (X_dense - X), whichever way it is measured.

    Args:
        rows: the layers' rows.
        dtype: of the weights.
    """

    def __init__(self, rows=ROWS, dtype=torch.float32):
        mix = torch.randn(D // 3, D, generator=generator(100), dtype=torch.float64)
        self.X = torch.randn(TOKENS, D // 3, generator=generator(0), dtype=torch.float64) @ mix
        self.X += 2 * torch.randn(TOKENS, D, generator=generator(1), dtype=torch.float64)
        self.X_dense = self.X + 0.3 * torch.randn(TOKENS, D, generator=generator(2), dtype=torch.float64)
        self.weights = [normal(n, D, seed=10 + i, dtype=dtype).cpu() for i, n in enumerate(rows)]
        self.streams = [torch.randn(TOKENS, n, generator=generator(20 + i)).double() for i, n in enumerate(rows)]
        G = (self.X.T @ self.X).float()
        self.G = (G.tril() + G.tril(-1).T).contiguous()

    @property
    def layers(self):
        return [(f"layer{i}", W) for i, W in enumerate(self.weights)]

    def truth(self, layer):
        """B in float64."""
        return self.weights[layer].double() @ (self.X_dense - self.X).T @ self.X

    def cross(self, layer, form):
        """The measures of a layer that calibration takes."""
        X, X_dense, W, h = self.X, self.X_dense, self.weights[layer].double(), self.streams[layer]
        if form == "inputs":
            matrix = X.T @ (X_dense - X)
        elif form == "streams":
            matrix = (h + X_dense @ W.T - h).T @ X
        else:
            matrix = (X_dense @ W.T - X @ W.T).T @ X
        return Cross(form, matrix.float())

    def crosses(self, forms):
        return [None if form is None else self.cross(i, form) for i, form in enumerate(forms)]


def stacked(case, forms):
    """The stack's weights, padded to a multiple of ROW_UNIT, and what `cross_rows` is given of its layers."""
    W = torch.cat(case.weights)
    padding = torch.zeros(-len(W) % ROW_UNIT, D, dtype=W.dtype)
    return torch.cat([W, padding]), list(zip(case.crosses(forms), ROWS, strict=True))


# A layer of each form beside layers of the others, and one without a target.
MIXED = [tuple(forms) for forms in itertools.permutations((*FORMS, None))]


class TestRows:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("operations", [cpu, triton_ops], ids=["cpu", "triton"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_those_of_float64(self, dtype, operations, form):
        case = Case(dtype=dtype)
        W, crosses = stacked(case, [form] * len(ROWS))
        B = cross_rows(crosses, 0, W, case.G, backend=Backend(operations)).double()
        truth = torch.cat([case.truth(i) for i in range(len(ROWS))])
        # The forms differ by what they subtract: products with the whole input, or with the difference of inputs.
        allowed = 2e-5 * truth.abs().max()
        assert (B[: len(truth)] - truth).abs().max() < allowed
        assert truth.abs().max() > 100
        assert not B[len(truth) :].any()

    @pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
    def test_of_streams_subtract_products_as_good_as_fp32(self, precision):
        """At bf16, W G alone would be wrong by more than the difference to the dense model is."""
        case = Case(dtype=torch.bfloat16)
        W, crosses = stacked(case, ["streams"] * len(ROWS))
        B = cross_rows(crosses, 0, W, case.G, backend=Backend(cpu, precision))
        truth = torch.cat([case.truth(i) for i in range(len(ROWS))])
        assert (B[: len(truth)] - truth).norm() < 1e-4 * truth.norm()

    @pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
    def test_of_inputs_are_rounded_once(self, precision):
        case = Case(dtype=torch.bfloat16)
        W, crosses = stacked(case, ["inputs"] * len(ROWS))
        B = cross_rows(crosses, 0, W, case.G, backend=Backend(cpu, precision))
        truth = torch.cat([case.truth(i) for i in range(len(ROWS))])
        unit = {"ieee": 2.0**-24, "tf32x3": 2.0**-22, "tf32": 2.0**-12, "bf16": 2.0**-9}[precision]
        assert (B[: len(truth)] - truth).norm() < max(unit, 2e-6) * truth.norm()

    @pytest.mark.parametrize("forms", MIXED, ids=str)
    def test_do_not_depend_on_where_a_chunk_begins(self, forms):
        """Chunks cross the borders of layers, and hold all, some or none of a layer's rows."""
        case = Case()
        W, crosses = stacked(case, forms)
        whole = cross_rows(crosses, 0, W, case.G)
        for height in (ROW_UNIT, 2 * ROW_UNIT, 3 * ROW_UNIT):
            chunks = [
                cross_rows(crosses, first, W[first : first + height], case.G) for first in range(0, len(W), height)
            ]
            assert torch.equal(torch.cat(chunks), whole)
        start = 0
        for form, rows in zip(forms, ROWS, strict=True):
            assert whole[start : start + rows].any() == (form is not None)
            start += rows
        assert not whole[start:].any()

    @pytest.mark.parametrize("forms", MIXED, ids=str)
    def test_what_was_measured_stays(self, forms):
        """Other chunks read it, too."""
        case = Case()
        W, crosses = stacked(case, forms)
        before = [None if cross is None else cross.matrix.clone() for cross, _ in crosses]
        G = case.G.clone()
        B = cross_rows(crosses, 0, W, case.G)
        B.fill_(torch.nan)
        assert torch.equal(case.G, G)
        for (cross, _), matrix in zip(crosses, before, strict=True):
            assert cross is None or torch.equal(cross.matrix, matrix)


class TestForms:
    """Layers that are pruned by `prune_layers`."""

    @pytest.mark.parametrize("refit", [0, 3])
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("form", ["inputs", "streams"])
    def test_all_give_the_same_target(self, form, text, refit):
        case, config = Case(), make_config(text, refit=refit, swaps=0 if refit else 20)
        pruned, results = run(case.layers, case.G, config=config, crosses=case.crosses([form] * len(ROWS)))
        expected = run(case.layers, case.G, config=config, crosses=case.crosses(["outputs"] * len(ROWS)))
        for_itself, _ = run(case.layers, case.G, config=config)
        for name, Z in expected[0].items():
            assert torch.equal(pruned[name] != 0, Z != 0)
            torch.testing.assert_close(pruned[name], Z, rtol=1e-4, atol=1e-4)
        assert not all(torch.equal(pruned[name], Z) for name, Z in for_itself.items())
        for a, b in zip(results, expected[1], strict=True):
            assert a.target == "dense"
            assert [getattr(a, e) for e in ERRORS] == pytest.approx([getattr(b, e) for e in ERRORS], rel=1e-3)

    @pytest.mark.parametrize("backend", [TORCH, Backend(cpu, "bf16")], ids=lambda backend: backend.precision)
    @pytest.mark.parametrize("refit", [0, 3])
    @pytest.mark.parametrize("forms", MIXED[::5], ids=str)
    def test_stacks_and_chunks_change_nothing(self, forms, refit, backend, set_threads):
        case = Case(dtype=torch.bfloat16)
        config, unit = make_config(refit=refit, swaps=0 if refit else 20), BYTES_PER_ENTRY * D * ROW_UNIT
        options = dict(G=case.G, config=config, backend=backend)
        together = run(case.layers, memory=1 << 40, crosses=case.crosses(forms), **options)
        assert [row.target for row in together[1]] == ["layer" if form is None else "dense" for form in forms]
        for threads, memory in ((1, unit), (1, 2 * unit), (3, 3 * unit)):
            set_threads(threads)
            assert_same(together, run(case.layers, memory=memory, crosses=case.crosses(forms), **options))
        set_threads(1)
        alone = [
            run([layer], crosses=[cross], **options)
            for layer, cross in zip(case.layers, case.crosses(forms), strict=True)
        ]
        joined = {name: Z for pruned, _ in alone for name, Z in pruned.items()}
        assert_same(together, (joined, [row for _, rows in alone for row in rows]))
