"""Layers that share an input: the weights written, the results reported, and the failures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.kernel_inputs import generator
from helpers.layer_inputs import PATTERNS, ROWS, D, assert_same, error, make_config, make_gram, make_layers, run

from sparsefw.errors import InputError
from sparsefw.kernels import cpu
from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.ranks import Ranks
from sparsefw.solver import METHODS, PruneConfig, choices, patterns, prune_layers, solve_layer
from sparsefw.solver.objective import damped
from sparsefw.solver.saliency import SALIENCIES
from sparsefw.solver.stack import TARGET_STEPS
from sparsefw.solver.target import Cross, find_target


class TestLayers:
    @pytest.mark.parametrize(("name", "value"), [("W", [[1.0]]), ("G", np.eye(4)), ("B", np.eye(4)), ("G", None)])
    def test_no_tensors(self, name, value):
        arguments = dict(W=torch.ones(2, 4), G=torch.eye(4)) | {name: value}
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got {type(value).__name__}$"):
            solve_layer(**arguments)

    def test_width(self):
        with pytest.raises(InputError, match="layer1: 30 inputs do not divide into groups of 4"):
            run(
                [("layer0", torch.ones(2, 32)), ("layer1", torch.ones(2, 30))], torch.eye(32), config=make_config("2:4")
            )

    def test_writes_through_views(self):
        """Weights stored (in, out), as some models do, and slices of a larger tensor."""
        layers = make_layers((37, 20), 48)
        expected = run(layers)
        wide = torch.zeros(48, 40, dtype=torch.bfloat16)
        block = torch.zeros(3, 20, 48, dtype=torch.bfloat16)
        views = [("layer0", wide[:, 1:38].T), ("layer1", block[1])]
        for (_, view), (_, W) in zip(views, layers, strict=True):
            view.copy_(W)
        list(prune_layers(views, make_gram(48), "sparsefw", make_config(), TORCH))
        for name, view in views:
            assert torch.equal(view, expected[0][name])
        assert wide[:, 0].abs().sum() + wide[:, 38:].abs().sum() + block[::2].abs().sum() == 0


class TestWritten:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("method", ["sparsefw", "sparsegpt", "wanda", "ria", "magnitude"])
    def test_errors_are_those_of_what_is_written(self, method, text, dtype):
        layers, G = make_layers((37, 20), 48, dtype), make_gram(48)
        pruned, results = run(layers, G, method, make_config(text))
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
        pruned, results = run(layers, config=make_config(refit=0))
        for (name, W), row in zip(layers, results, strict=True):
            assert torch.equal(pruned[name], W * (pruned[name] != 0))
            assert row.error == row.error_mask
            assert row.error < row.error_warm_start or len(W) == 1

    def test_gram_matrix_stays(self):
        G = make_gram()
        before = G.clone()
        list(prune_layers(make_layers(), G, "sparsefw", make_config(), TORCH))
        assert torch.equal(G, before)

    def test_options_of_the_config_arrive(self, monkeypatch):
        seen = []
        solve, reselect = choices.frank_wolfe.solve, choices.reselect
        monkeypatch.setattr(choices.frank_wolfe, "solve", lambda *a, **o: seen.append(o) or solve(*a, **o))
        monkeypatch.setattr(choices, "reselect", lambda *a, **o: seen.append(o) or reselect(*a, **o))
        config = make_config(steps=7, step_rule="open-loop", penalty=0.5, refit=2, rounds=1, swaps=6)
        backend = Backend(cpu, "tf32")
        run(make_layers((5,)), config=config, backend=backend)
        common = {"steps": 7, "penalty": 0.5, "backend": backend}
        assert seen == [
            common | {"step_rule": "open-loop", "swaps": 6, "fallback_to_warm_start": True},
            common | {"refit_steps": 2, "rounds": 1, "support": None},
        ]


class TestNeverWorse:
    def test_rows_that_a_refit_would_hurt_keep_their_weights(self, set_threads, monkeypatch):
        """Two rows of three get garbage, NaN and Inf; every third row is refitted."""
        # All rows in one chunk.
        set_threads(1)
        layers, reselect = make_layers(), choices.reselect
        # Without damping and with the same penalty, like the mask that a refit starts from.
        mask_only, _ = run(layers, config=make_config(refit=0, damp=0.0, penalty=make_config().penalty))
        good, _ = run(layers)

        def garbage(*args, **options):
            fit = reselect(*args, **options)
            fit.mask[::3] = ~fit.mask[::3]
            fit.Z[::3] = torch.randn(fit.Z[::3].shape, generator=generator(3)) * 5
            fit.Z[1::3] = torch.nan
            fit.Z[1] = torch.inf
            # The fit's own error does not count.
            fit.error.zero_()
            return fit

        monkeypatch.setattr(choices, "reselect", garbage)
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
        """With hardly correlated inputs and weights of few bits, rounding undoes the gain of a refit in some rows."""
        G = torch.eye(D) + 1e-3 * make_gram() / make_gram().diagonal().mean()
        G = (G + G.T) / 2
        layers = make_layers()
        mask_only, _ = run(layers, G, config=make_config(refit=0))
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

        monkeypatch.setattr(choices, "reselect", fail)
        with pytest.raises(FloatingPointError, match="layer0, layer1: no"):
            list(prune_layers(make_layers((3, 4)), G, "sparsefw", make_config(), TORCH))
        assert torch.equal(G, before)

    # Some squares are below the smallest normal number, so that their reciprocals overflow.
    @pytest.mark.parametrize("scale", [1e-12, 1e-21, 1e-22])
    @pytest.mark.parametrize("text", ["0.6", "2:4"])
    def test_nearly_dead_inputs(self, scale, text):
        layers, unit = make_layers((37,), 48), torch.ones(48)
        unit[4:7] = scale
        G = make_gram(48) * unit * unit[:, None]
        pruned, results = run(layers, G, config=make_config(text))
        assert pruned["layer0"].isfinite().all()
        assert results[0].error < results[0].error_mask


class TestSolveLayer:
    """One layer, for callers with a loop of their own."""

    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("options", [{}, {"refit": 0}, {"method": "sparsegpt"}, {"method": "ria"}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_as_prune_layers(self, dtype, options, text):
        config = make_config(text, **options) if "method" not in options else PruneConfig(text, **options)
        W, G = make_layers((37,), dtype=dtype)[0][1], make_gram()
        before = W.clone(), G.clone()
        mask, Z, result = solve_layer(W, G, config, name="mine")
        masks = []
        pruned, (row,) = run([("mine", W)], G, config.method, config, masks=masks)
        assert torch.equal(Z, pruned["mine"])
        assert torch.equal(mask, masks[0])
        assert replace(result, seconds=0) == replace(row, seconds=0)
        assert torch.equal(W, before[0])
        assert torch.equal(G, before[1])
        assert (Z.dtype, Z.shape, mask.dtype, mask.shape) == (dtype, W.shape, torch.bool, W.shape)

    @pytest.mark.parametrize("options", [{}, {"method": "sparsegpt"}, {"preset": "paper", "steps": 20}], ids=str)
    def test_autocast_changes_nothing(self, options):
        W, G, config = make_layers((37,))[0][1], make_gram(), PruneConfig("layer:0.6", **options)
        expected = solve_layer(W, G, config)
        with torch.autocast("cpu", torch.bfloat16):
            found = solve_layer(W, G, config)
        assert torch.equal(found[1], expected[1])
        assert replace(found[2], seconds=0) == replace(expected[2], seconds=0)

    @pytest.mark.parametrize("options", [{}, {"refit": 0}], ids=str)
    def test_mask_weight_and_errors_by_definition(self, options):
        W, G = make_layers((37,))[0][1], make_gram()
        mask, Z, result = solve_layer(W, G, make_config("0.6", **options))
        assert (mask.sum(1) == D - int(0.6 * D)).all()
        assert torch.equal(Z != 0, mask)
        assert torch.equal(Z, W * mask) == (options == {"refit": 0})
        warm = torch.zeros_like(mask).scatter_(
            1, (W.float().abs() * G.diagonal().sqrt()).topk(D - int(0.6 * D)).indices, True
        )
        assert result.name == "layer"
        assert result.kept == mask.sum()
        assert result.error == pytest.approx(error(W, Z, G).sum().item(), rel=1e-5)
        assert result.error_warm_start == pytest.approx(error(W, W * warm, G).sum().item(), rel=1e-5)
        assert result.error <= result.error_mask <= result.error_warm_start
        if options == {"refit": 0}:
            assert result.error_mask == pytest.approx(error(W, W * mask, G).sum().item(), rel=1e-5)

    def test_default(self):
        """That of a run whose blocks are not reconstructed."""
        W, G = make_layers((5,), dtype=torch.float32)[0][1], make_gram()
        mask, Z, result = solve_layer(W, G)
        for config in (PruneConfig(), PruneConfig(reconstruct=0), PruneConfig(steps=24, refit=4)):
            same_mask, same, _ = solve_layer(W, G, config)
            assert torch.equal(mask, same_mask)
            assert torch.equal(Z, same)
        assert (result.pattern, result.method, result.steps) == ("0.6", "sparsefw", 24)

    @pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 2e4)])
    def test_the_error_is_that_of_the_weights_as_they_are_written(self, dtype, size):
        """Where hardly a weight is removed, rounding is most of the error. fp16 has no room for some targets."""
        (_, W), G = make_layers((64,), dtype=torch.float32)[0], make_gram()
        W, B = (size * W).to(dtype), 0.5 * size * torch.randn(W.shape, generator=generator(51)) @ G
        _, Z, result = solve_layer(W, G, make_config("0.05", damp=0), B=B.clone())
        assert Z.isfinite().all()
        T = find_target(W, G, B, TARGET_STEPS).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        assert result.error == pytest.approx(error(T, Z, G).sum().item(), rel=1e-3)

    @pytest.mark.parametrize("refit", [0, 3])
    def test_target(self, refit):
        """B is the cross matrix of the wanted output minus the actual output."""
        W, G = make_layers((37,), dtype=torch.float32)[0][1], make_gram()
        B = 200 * torch.randn(37, D, generator=generator(50))
        config = make_config(refit=refit)
        T = find_target(W, damped(G, config.damp), B.clone(), TARGET_STEPS)
        mask, Z, result = solve_layer(W, G, config, B=B.clone())
        masks = []
        pruned, (row,) = run([("layer", W)], G, config=config, crosses=[Cross("outputs", B)], masks=masks)
        assert torch.equal(Z, pruned["layer"])
        assert torch.equal(mask, masks[0])
        assert result.target == row.target == "dense"
        assert result.error == row.error == pytest.approx(error(T, Z, G).sum().item(), rel=1e-4)
        _, for_itself, _ = solve_layer(W, G, config)
        assert result.error < error(T, for_itself, G).sum()

    def test_methods_without_targets_refuse_one(self):
        with pytest.raises(ValueError, match="crosses: wanda approximates what the layers themselves put out"):
            solve_layer(torch.ones(3, D), make_gram(), PruneConfig(method="wanda"), B=torch.ones(3, D))

    def test_ranks_share_rows_only_where_rows_do_not_depend_on_each_other(self):
        for method, options in (("sparsegpt", {}), ("ria", {}), ("wanda", {"sparsity": "layer:0.5"})):
            with pytest.raises(ValueError, match=f"ranks: the rows of a layer cannot be solved apart by {method}"):
                run(make_layers(), method=method, config=PruneConfig(method=method, **options), ranks=Ranks(0, 2))

    @pytest.mark.parametrize("config", ["2:4", {"sparsity": "2:4"}], ids=str)
    def test_config_of_another_type(self, config):
        with pytest.raises(TypeError, match=f"^config: expected a PruneConfig, got {type(config).__name__}$"):
            solve_layer(torch.ones(2, 4), torch.eye(4), config)

    def test_width(self):
        with pytest.raises(InputError, match="mine: 30 inputs do not divide into groups of 4"):
            solve_layer(torch.ones(2, 30), torch.eye(30), PruneConfig("2:4"), name="mine")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("where", ["W", "G"])
    @pytest.mark.parametrize("method", METHODS)
    def test_not_finite(self, method, where, value):
        inputs = {"W": make_layers((3,))[0][1], "G": make_gram()}
        inputs[where][1, 2] = value
        with pytest.raises(FloatingPointError, match=r"mine: .*(not finite|NaN or Inf)"):
            solve_layer(**inputs, config=PruneConfig(method=method), name="mine")


class TestCompared:
    """A method compared with the paper's, whose budget covers the whole matrix."""

    @pytest.mark.parametrize("method", ["wanda", "ria", "magnitude"])
    def test_rows_share_the_budget_as_ever(self, method):
        config = PruneConfig.paper(sparsity="layer:0.6", compare=(method,), steps=5)
        plain = PruneConfig(sparsity="layer:0.6", method=method)
        layers = make_layers()
        by_method = {name: run(layers, method=name, config=config) for name in config.methods}
        assert_same(by_method[method], run(layers, method=method, config=plain))
        for pruned, rows in by_method.values():
            for (name, W), row in zip(layers, rows, strict=True):
                assert (pruned[name] != 0).sum() == row.kept == W.numel() - int(config.pattern.sparsity * W.numel())
        saliency = SALIENCIES[method](layers[3][1], make_gram().diagonal())
        kept = (by_method[method][0]["layer3"] != 0).sum(1)
        assert torch.equal(kept, patterns.kept(config.pattern, saliency))
        assert kept.unique().numel() > 3

    def test_the_paper_s_errors_are_of_the_matrix(self):
        """The paper's method solves each layer by itself, and its gap is that of all rows together."""
        config = PruneConfig.paper(sparsity="layer:0.6", steps=50)
        _, rows = run(make_layers(), config=config)
        assert all(0 <= row.gap <= row.error for row in rows)
        assert [row.error_mask for row in rows] == [row.error for row in rows]
