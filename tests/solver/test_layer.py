"""Layers that share an input: stacks and chunks, what is written and reported."""

import pytest
import torch
from helpers.kernel_inputs import generator
from helpers.layer_inputs import PATTERNS, ROWS, D, assert_same, error, make_gram, make_layers, run, settings

from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.solver import methods, patterns, reselect
from sparsefw.solver.layer import BYTES_PER_ENTRY, ROW_UNIT, prune_layers
from sparsefw.solver.methods import METHODS, Method


class TestStack:
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("warm_start", ["wanda", "ria"])
    def test_like_each_layer_alone(self, text, warm_start):
        """RIA's saliency depends on the whole layer, and a `layer:` budget too."""
        layers, how = make_layers(), settings(text, warm_start=warm_start)
        together = run(layers, how=how)
        alone = [run([layer], how=how) for layer in layers]
        assert_same(
            together, ({n: W for one, _ in alone for n, W in one.items()}, [r for _, one in alone for r in one])
        )

    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("refit_steps", [0, 3])
    def test_chunks_and_threads_change_nothing(self, text, refit_steps, set_threads, monkeypatch):
        unit, sizes, choose = BYTES_PER_ENTRY * D * ROW_UNIT, [], methods.choose_frank_wolfe

        def spy(rows, *rest):
            sizes[-1].append(len(rows.W))
            assert torch.get_num_threads() == 1
            return choose(rows, *rest)

        monkeypatch.setitem(METHODS, "sparsefw", Method(spy, damps=True))
        results = []
        for threads in (1, 3):
            set_threads(threads)
            for memory in (1 << 40, 3 * unit - 1, unit):
                sizes.append([])
                how = settings(text, memory=memory, refit=refit_steps, swaps=0 if refit_steps else 20)
                results.append(run(make_layers(), how=how))
                assert torch.get_num_threads() == threads
        # Shared out over the threads, of which there are no more than the memory has room for.
        assert sizes == [[256], [128, 128], [64] * 4, [128, 128], [64] * 4, [64] * 4]
        for result in results[1:]:
            assert_same(results[0], result)

    def test_errors_of_threads_arrive(self, set_threads, monkeypatch):
        def fail(rows, *rest):
            raise FloatingPointError("no")

        set_threads(3)
        monkeypatch.setitem(METHODS, "sparsefw", Method(fail, damps=True))
        with pytest.raises(FloatingPointError, match="layer0, layer1, layer2, layer3: no"):
            run(make_layers())
        assert torch.get_num_threads() == 3

    def test_too_little_memory(self):
        with pytest.raises(InputError, match=r"layer0: a solve needs 0.000 GiB at least, and 0.000 are set aside"):
            run(make_layers(), how=settings(memory=BYTES_PER_ENTRY * D * ROW_UNIT - 1))

    def test_width(self):
        with pytest.raises(InputError, match="layer1: 30 inputs do not divide into groups of 4"):
            run([("layer0", torch.ones(2, 32)), ("layer1", torch.ones(2, 30))], torch.eye(32), how=settings("2:4"))

    def test_writes_through_views(self):
        """Weights stored (in, out), as some models do, and slices of a larger tensor."""
        layers = make_layers((37, 20), 48)
        expected = run(layers)
        wide = torch.zeros(48, 40, dtype=torch.bfloat16)
        block = torch.zeros(3, 20, 48, dtype=torch.bfloat16)
        views = [("layer0", wide[:, 1:38].T), ("layer1", block[1])]
        for (_, view), (_, W) in zip(views, layers, strict=True):
            view.copy_(W)
        list(prune_layers(views, make_gram(48), "sparsefw", settings(), cpu))
        for name, view in views:
            assert torch.equal(view, expected[0][name])
        assert wide[:, 0].abs().sum() + wide[:, 38:].abs().sum() + block[::2].abs().sum() == 0


class TestWritten:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("method", ["sparsefw", "sparsegpt", "wanda", "ria", "magnitude"])
    def test_errors_are_those_of_what_is_written(self, method, text, dtype):
        layers, G = make_layers((37, 20), 48, dtype), make_gram(48)
        pruned, results = run(layers, G, method, settings(text))
        for (name, W), row in zip(layers, results, strict=True):
            Z = pruned[name]
            assert Z.dtype == dtype
            assert row.name == name
            assert row.shape == W.shape
            # Weights before they are rounded to bf16 are off by 1e-4.
            assert row.error == pytest.approx(error(W, Z, G).sum().item(), rel=1e-5)
            pattern = patterns.parse(text)
            assert row.kept == W.numel() - int(pattern.sparsity * W.numel()) or text == "0.6"
            if text == "0.6" and method != "sparsegpt":
                assert ((Z != 0).sum(1) == 48 - 28).all()
            if text == "2:4":
                assert ((Z != 0).view(-1, 4).sum(1) == 2).all()
            assert row.kept == (Z != 0).sum()
            unchanged = error(W, W * (Z != 0), G).sum().item()
            if method in ("wanda", "ria", "magnitude"):
                assert row.error == row.error_mask == row.error_warm_start == pytest.approx(unchanged, rel=1e-3)
                assert row.relative_error == row.relative_mask == 1
                assert torch.equal(Z, W * (Z != 0))
                assert row.gap is None
            if method == "sparsegpt":
                assert row.error_mask == pytest.approx(unchanged, rel=1e-3)
                assert row.error < row.error_mask
            if method == "sparsefw":
                assert 0 < row.error < row.error_mask < row.error_warm_start
                assert 0 <= row.gap <= row.error_mask
            assert row.relative_error == row.error / row.error_warm_start
            assert row.relative_mask == row.error_mask / row.error_warm_start
            assert row.pattern == text
            assert row.alpha == (0.5 if method == "sparsefw" else None)
            assert row.steps == (9 if method == "sparsefw" else 0)

    def test_without_refit_kept_weights_stay(self):
        layers = make_layers()
        pruned, results = run(layers, how=settings(refit=0))
        for (name, W), row in zip(layers, results, strict=True):
            assert torch.equal(pruned[name], W * (pruned[name] != 0))
            assert row.error == row.error_mask
            assert row.error < row.error_warm_start or len(W) == 1

    def test_gram_matrix_stays(self):
        G = make_gram()
        before = G.clone()
        list(prune_layers(make_layers(), G, "sparsefw", settings(), cpu))
        assert torch.equal(G, before)

    def test_damping_is_that_of_the_settings(self, monkeypatch):
        """The refit sees the damped matrix, and so do masks that are final; the errors are on the measured one."""
        G, seen = make_gram(), []

        def spy(function):
            def call(problem, *rest, **options):
                seen.append([None if x is None else x.diagonal() / G.diagonal() for x in (problem.G, problem.damped)])
                return function(problem, *rest, **options)

            return call

        monkeypatch.setattr(reselect, "refine", spy(reselect.refine))
        monkeypatch.setattr(methods.frank_wolfe, "solve", spy(methods.frank_wolfe.solve))
        run(make_layers((5,)), G, how=settings(damp=0.5))
        run(make_layers((5,)), G, how=settings(damp=0.3, refit=0))
        (mask, no_damping), (refitted, _), (measured, chosen_on) = seen
        assert no_damping is None
        torch.testing.assert_close(torch.stack([mask, measured]), torch.ones(2, D))
        torch.testing.assert_close(refitted, torch.full((D,), 1.5))
        torch.testing.assert_close(chosen_on, torch.full((D,), 1.3))

    def test_settings_arrive(self, monkeypatch):
        seen = []
        solve, refine = methods.frank_wolfe.solve, reselect.refine
        monkeypatch.setattr(methods.frank_wolfe, "solve", lambda *a, **o: seen.append(o) or solve(*a, **o))
        monkeypatch.setattr(reselect, "refine", lambda *a, **o: seen.append(o) or refine(*a, **o))
        how = settings(steps=7, step_rule="open-loop", penalty=0.5, precision="tf32", refit=2, rounds=1, swaps=6)
        run(make_layers((5,)), how=how)
        common = {"steps": 7, "penalty": 0.5, "precision": "tf32", "ops": cpu}
        assert seen == [
            common | {"step_rule": "open-loop", "swaps": 6, "best_of": True},
            common | {"refit_steps": 2, "rounds": 1},
        ]


class TestNeverWorse:
    def test_rows_that_a_refit_would_hurt_keep_their_weights(self, set_threads, monkeypatch):
        """Garbage, NaN and Inf in two rows of three; the third is refitted."""
        # All rows in one chunk.
        set_threads(1)
        layers, refine = make_layers(), reselect.refine
        # Without damping, as the mask that a refit starts from.
        mask_only, _ = run(layers, how=settings(refit=0, damp=0.0))
        good, _ = run(layers)

        def garbage(*args, **options):
            fit = refine(*args, **options)
            fit.mask[::3] = ~fit.mask[::3]
            fit.Z[::3] = torch.randn(fit.Z[::3].shape, generator=generator(3)) * 5
            fit.Z[1::3] = torch.nan
            fit.Z[1] = torch.inf
            # Whatever it says of itself.
            fit.error.zero_()
            return fit

        monkeypatch.setattr(reselect, "refine", garbage)
        G = make_gram()
        pruned, results = run(layers, G)
        bad = torch.arange(sum(ROWS)) % 3 < 2
        stacked, before, refitted = (torch.cat(list(x.values())) for x in (pruned, mask_only, good))
        assert torch.equal(stacked[bad], before[bad])
        assert torch.equal(stacked[~bad], refitted[~bad])
        for (name, W), row in zip(layers, results, strict=True):
            assert row.error == pytest.approx(error(W, pruned[name], G).sum().item(), rel=1e-3)
            assert row.kept == (pruned[name] != 0).sum()

    def test_row_by_row(self):
        """Hardly correlated inputs and weights of few bits: rounding eats what a refit gains in some rows."""
        G = torch.eye(D) + 1e-3 * make_gram() / make_gram().diagonal().mean()
        G = (G + G.T) / 2
        layers = make_layers()
        mask_only, _ = run(layers, G, how=settings(refit=0))
        pruned, _ = run(layers, G)
        untouched = 0
        for name, W in layers:
            old, new = error(W, mask_only[name], G), error(W, pruned[name], G)
            assert (new <= old * (1 + 1e-5)).all()
            same = (pruned[name] == mask_only[name]).all(1)
            assert torch.equal(new[same], old[same])
            untouched += int(same.sum())
        assert 0 < untouched < sum(ROWS)


class TestFailures:
    @pytest.mark.parametrize("method", ["sparsefw", "sparsegpt"])
    @pytest.mark.parametrize("where", ["W", "G"])
    def test_not_finite_names_the_layers(self, where, method):
        layers, G = make_layers((3, 4)), make_gram()
        (layers[0][1] if where == "W" else G)[1, 2] = torch.inf
        names = "layer0, layer1" if method == "sparsefw" else "layer0"
        with pytest.raises(FloatingPointError, match=f"^{names}: .*(not finite|NaN or Inf)"):
            run(layers, G, method)

    def test_not_positive_definite_names_the_layer(self):
        with pytest.raises(FloatingPointError, match="layer0: the Gram matrix is not positive definite"):
            run(make_layers((3, 4)), -torch.eye(D) + 2 * torch.ones(D, D), method="sparsegpt")

    def test_gram_matrix_comes_back_when_a_refit_fails(self, monkeypatch):
        G = make_gram()
        before = G.clone()

        def fail(*args, **options):
            raise FloatingPointError("no")

        monkeypatch.setattr(reselect, "refine", fail)
        with pytest.raises(FloatingPointError, match="layer0, layer1: no"):
            list(prune_layers(make_layers((3, 4)), G, "sparsefw", settings(), cpu))
        assert torch.equal(G, before)

    # Squares below the smallest normal number: their reciprocals overflow.
    @pytest.mark.parametrize("scale", [1e-12, 1e-21, 1e-22])
    @pytest.mark.parametrize("text", ["0.6", "2:4"])
    def test_nearly_dead_inputs(self, scale, text):
        layers, unit = make_layers((37,), 48), torch.ones(48)
        unit[4:7] = scale
        G = make_gram(48) * unit * unit[:, None]
        pruned, results = run(layers, G, how=settings(text))
        assert pruned["layer0"].isfinite().all()
        assert results[0].error < results[0].error_mask
