"""Stacks and chunks of rows change no result; chunks fit the memory and run on several threads."""

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import first_is_fast
from helpers.kernel_inputs import DEVICE, generator, normal
from helpers.problems import PATTERNS, ROWS, D, assert_same, make_config, make_layers, run

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.solver.methods import CHOOSE
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT, places
from sparsefw.solver.targets import Cross, cross_rows

UNIT = BYTES_PER_ENTRY * D * ROW_UNIT
FORMS = ("inputs", "streams", "outputs")


class Case:
    """Layers of one input that lose by what was pruned before them, in float64.

    Every layer adds W X to the stream h. The dense model's stream behind it is S = h + W X_dense, so the layer's output
    falls short by D = W (X_dense - X), whichever way it is measured.
    """

    def __init__(self, dtype=torch.float32, device="cpu"):
        mix = torch.randn(D // 3, D, generator=generator(100), dtype=torch.float64)
        self.X = torch.randn(200, D // 3, generator=generator(0), dtype=torch.float64) @ mix
        self.X += 2 * torch.randn(200, D, generator=generator(1), dtype=torch.float64)
        X_dense = self.X + 0.3 * torch.randn(200, D, generator=generator(2), dtype=torch.float64)
        self.X, self.X_dense = self.X.to(device), X_dense.to(device)
        self.weights = [normal(n, D, seed=10 + i, dtype=dtype).to(device) for i, n in enumerate(ROWS)]
        G = (self.X.T @ self.X).float()
        self.G = (G.tril() + G.tril(-1).T).contiguous()
        self.layers = [(f"layer{i}", W) for i, W in enumerate(self.weights)]
        self.truth = torch.cat([W.double() @ (self.X_dense - self.X).T @ self.X for W in self.weights])

    def crosses(self, forms):
        """The measures of the layers that calibration takes."""
        X, X_dense, crosses = self.X, self.X_dense, []
        for W, form in zip(self.weights, forms, strict=True):
            W = W.double()
            h = torch.randn(200, len(W), generator=generator(20)).to(W)
            matrix = {
                None: None,
                "inputs": X.T @ (X_dense - X),
                "streams": (h + X_dense @ W.T - h).T @ X,
                "outputs": (X_dense @ W.T - X @ W.T).T @ X,
            }[form]
            crosses.append(None if matrix is None else Cross(form, matrix.float()))
        return crosses

    def stacked(self, forms):
        """What `cross_rows` is given of the layers, with weights that are padded to a multiple of ROW_UNIT."""
        W = torch.cat(self.weights)
        W = torch.cat([W, W.new_zeros(-len(W) % ROW_UNIT, D)])
        return self.crosses(forms), places(self.weights, slice(0, len(W))), W, self.G


class TestCrossRows:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("operations", [cpu, triton_ops], ids=["cpu", "triton"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_those_of_float64(self, dtype, operations, form):
        case = Case(dtype, DEVICE)
        B = cross_rows(*case.stacked([form] * len(ROWS)), backend=Backend(operations)).double()
        # The forms differ by what they subtract: products with the whole input, or with the difference of inputs.
        assert (B[: len(case.truth)] - case.truth).abs().max() < 2e-5 * case.truth.abs().max()
        assert not B[len(case.truth) :].any()

    @pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32", "bf16"])
    def test_streams_subtract_products_as_good_as_fp32_and_inputs_are_rounded_once(self, precision):
        """At bf16, W G alone would be wrong by more than the difference to the dense model is."""
        case, unit = Case(torch.bfloat16), dict(ieee=2e-6, tf32x3=2e-6, tf32=2.0**-12, bf16=2.0**-9)[precision]
        for form, most in (("streams", 1e-4), ("inputs", unit)):
            B = cross_rows(*case.stacked([form] * len(ROWS)), backend=Backend(cpu, precision))
            assert (B[: len(case.truth)] - case.truth).norm() < most * case.truth.norm()


class TestStack:
    @pytest.mark.parametrize("text", first_is_fast(PATTERNS))
    @pytest.mark.parametrize(
        "options", [dict(refit=0, swaps=20), dict(warm_start="ria"), dict(keep_zeros=True)], ids=str
    )
    @pytest.mark.parametrize("forms", first_is_fast([(*FORMS, None), None]), ids=str)
    def test_stacks_chunks_and_threads_change_nothing(self, text, options, forms, set_threads):
        """RIA's saliency and a `layer:` budget depend on the whole layer."""
        case, config = Case(torch.bfloat16), make_config(text, **options)

        def crosses():
            return None if forms is None else case.crosses(forms)

        together = run(case.layers, case.G, config=config, memory=1 << 40, crosses=crosses())
        for threads, memory in ((1, UNIT), (3, 3 * UNIT)):
            set_threads(threads)
            assert_same(together, run(case.layers, case.G, config=config, memory=memory, crosses=crosses()))
        set_threads(1)
        for n, layer in enumerate(case.layers):
            (pruned, (row,)) = run([layer], case.G, config=config, crosses=crosses() and [crosses()[n]])
            assert_same(({layer[0]: together[0][layer[0]]}, [together[1][n]]), (pruned, [row]))

    def test_products_in_bf16(self, set_threads):
        case, config = Case(torch.bfloat16), make_config(precision="bf16")
        results = []
        for memory in (1 << 40, UNIT):
            crosses = case.crosses((*FORMS, None))
            results.append(run(case.layers, case.G, config=config, memory=memory, crosses=crosses))
        assert_same(*results)


class TestChunks:
    def test_rows_are_shared_out_over_the_threads_that_the_memory_has_room_for(self, set_threads, monkeypatch):
        sizes, choose = [], CHOOSE["sparsefw"]

        def spy(problem, *rest):
            sizes[-1].append(len(problem.W))
            assert torch.get_num_threads() == 1
            return choose(problem, *rest)

        monkeypatch.setitem(CHOOSE, "sparsefw", spy)
        for threads in (1, 3):
            set_threads(threads)
            for memory in (1 << 40, 3 * UNIT - 1, UNIT):
                sizes.append([])
                run(make_layers(), memory=memory)
                assert torch.get_num_threads() == threads
        assert sizes == [[256], [128, 128], [64] * 4, [128, 128], [64] * 4, [64] * 4]

    def test_errors_of_threads_arrive(self, set_threads, monkeypatch):
        def fail(problem, *rest):
            raise FloatingPointError("no")

        set_threads(3)
        monkeypatch.setitem(CHOOSE, "sparsefw", fail)
        with pytest.raises(FloatingPointError, match="layer0, layer1, layer2, layer3: no"):
            run(make_layers())
        assert torch.get_num_threads() == 3

    def test_too_little_memory(self):
        with refused(r"layer0: a solve needs at least 0.000 GiB of memory, but has 0.000"):
            run(make_layers(), memory=UNIT - 1)
