"""Layers that share an input: the weights written, the results reported, and the failures."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.families import first_is_fast
from helpers.kernel_inputs import generator
from helpers.problems import (
    ERRORS,
    PATTERNS,
    ROWS,
    D,
    assert_same,
    error,
    make_config,
    make_crosses,
    make_gram,
    make_layer,
    make_layers,
    run,
)
from helpers.tensors import assert_equal

from sparsefw.errors import InputError
from sparsefw.solver import methods, patterns
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.layer import prune_layers, solve_layer
from sparsefw.solver.methods import SALIENCIES
from sparsefw.solver.targets import TARGET_STEPS, Cross, damped, find_target

ALL = pytest.mark.parametrize("text", PATTERNS)


def config_of(method, text="0.6", **options):
    if method == "sparsefw":
        return make_config(text, **options)
    return PruneConfig(text, method, kernel="torch", precision="ieee", **options)


class TestWritten:
    @pytest.mark.parametrize("dtype", first_is_fast([torch.bfloat16, torch.float16, torch.float32]))
    @ALL
    @pytest.mark.parametrize("method", ["sparsefw", "sparsegpt", "wanda", "ria", "magnitude"])
    def test_errors_are_those_of_what_is_written(self, method, text, dtype):
        layers, G = make_layers((37, 20), 48, dtype), make_gram(48)
        before = G.clone()
        pruned, results = run(layers, G, method, make_config(text))
        assert torch.equal(G, before)
        _, of_wanda = run(layers, G, "wanda", make_config(text))
        config = config_of("sparsefw", text, warm_start="ria")
        of_ria, row = (run(layers, G, name, config)[1][0] for name in ("ria", method))
        assert row.error_warm_start == pytest.approx(of_ria.error, rel=1e-6)
        for (name, W), row, base in zip(layers, results, of_wanda, strict=True):
            Z = pruned[name]
            # Whatever mask the method starts from.
            assert row.error_warm_start == pytest.approx(base.error, rel=1e-6)
            assert (Z.dtype, row.name, row.shape, row.pattern) == (dtype, name, W.shape, text)
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
            if method in SALIENCIES:
                assert row.error == row.error_mask == pytest.approx(unchanged, rel=1e-3)
                assert torch.equal(Z, W * (Z != 0))
                assert row.gap is None
            if method == "sparsegpt":
                assert row.error < row.error_mask == pytest.approx(unchanged, rel=1e-3)
            if method == "sparsefw":
                assert 0 < row.error < row.error_mask < row.error_warm_start
                assert 0 <= row.gap <= row.error_mask
            assert (row.alpha, row.steps) == ((0.5, 9) if method == "sparsefw" else (None, 0))

    def test_views(self):
        """Weights stored (in, out), as some models do, and slices of a larger tensor."""
        layers = make_layers((37, 20), 48)
        expected = run(layers)
        wide = torch.zeros(48, 40, dtype=torch.bfloat16)
        block = torch.zeros(3, 20, 48, dtype=torch.bfloat16)
        views = [("layer0", wide[:, 1:38].T), ("layer1", block[1])]
        for (_, view), (_, W) in zip(views, layers, strict=True):
            view.copy_(W)
        prune_layers(views, make_gram(48), "sparsefw", make_config())
        for name, view in views:
            assert torch.equal(view, expected[0][name])
        assert wide[:, 0].abs().sum() + wide[:, 38:].abs().sum() + block[::2].abs().sum() == 0


def test_rows_that_a_refit_would_hurt_keep_their_weights(set_threads, monkeypatch):
    """Two rows of three get garbage, NaN and Inf; every third row is refitted."""
    # All rows in one chunk.
    set_threads(1)
    layers, reselect = make_layers(), methods.reselect
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

    monkeypatch.setattr(methods, "reselect", garbage)
    G = make_gram()
    pruned, results = run(layers, G)
    bad = torch.arange(sum(ROWS)) % 3 < 2
    stacked, before, refitted = (torch.cat(list(x.values())) for x in (pruned, mask_only, good))
    assert torch.equal(stacked[bad], before[bad])
    assert torch.equal(stacked[~bad], refitted[~bad])
    for (name, W), row in zip(layers, results, strict=True):
        assert row.error == pytest.approx(error(W, pruned[name], G).sum().item(), rel=1e-3)
        assert row.kept == (pruned[name] != 0).sum()


class TestTargets:
    """Layers with a cross matrix: their targets are pruned in place of their weights."""

    @ALL
    @pytest.mark.parametrize("refit", [0, 3])
    def test_errors_and_masks_are_those_of_the_targets(self, text, refit):
        """A layer without a cross matrix is its own target."""
        config = make_config(text, refit=refit, swaps=0 if refit else 20, alpha=0.5 if refit else 0.0)
        layers, G, crosses = make_layers(dtype=torch.float32), make_gram(), make_crosses()
        crosses[2] = None
        pruned, results = run(layers, G, config=config, crosses=crosses)
        for_itself, _ = run(layers, G, config=config)
        for (name, W), cross, row in zip(layers, crosses, results, strict=True):
            Z, H = pruned[name], damped(G, config.damp)
            T = W if cross is None else find_target(W, H, cross.matrix.clone(), TARGET_STEPS)
            assert row.error == pytest.approx(error(T, Z, G).sum().item(), rel=1e-4)
            assert row.target == ("layer" if cross is None else "dense")
            if cross is None:
                assert torch.equal(Z, for_itself[name])
                continue
            assert len(W) == 1 or row.error < error(T, for_itself[name], G).sum()
            if refit:
                # The result is that of pruning the target by itself.
                (alone, (other,)) = run([(name, T)], G, config=config)
                assert torch.equal(alone[name] != 0, Z != 0)
                torch.testing.assert_close(alone[name], Z, rtol=1e-4, atol=1e-4)
                assert [getattr(row, e) for e in ERRORS] == pytest.approx([getattr(other, e) for e in ERRORS], rel=1e-3)
            else:
                assert torch.equal(Z, W * (Z != 0))

    @pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 2e4)])
    def test_the_error_is_that_of_the_weights_as_they_are_written(self, dtype, size):
        """Where hardly a weight is removed, rounding is most of the error. fp16 has no room for some targets."""
        W, G = make_layer(64, torch.float32)
        W, B = (size * W).to(dtype), 0.5 * size * torch.randn(W.shape, generator=generator(51)) @ G
        _, Z, result = solve_layer(W, G, make_config("0.05", damp=0), B=B.clone())
        assert Z.isfinite().all()
        T = find_target(W, G, B, TARGET_STEPS).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        assert result.error == pytest.approx(error(T, Z, G).sum().item(), rel=1e-3)


class TestKeepZeros:
    """Weights that are zero stay zero with `keep_zeros`, and masks are no worse for it."""

    def layers(self, dtype):
        """Weights of one sign, with zeros in every row and every sixth column; some rows have few others."""
        layers = []
        for i, (name, W) in enumerate(make_layers(dtype=dtype)):
            W = W.abs()
            W[torch.rand(W.shape, generator=generator(70 + i)) < 0.1] = 0
            W[:, ::6] = 0
            W[::7, 9:] = 0
            layers.append((name, W))
        return layers

    def gram(self):
        """Every sixth input is the sum of the next five, so that its weight could replace theirs."""
        X = torch.randn(300, D, generator=generator(0))
        X[:, ::6] = X.view(300, -1, 6)[:, :, 1:].sum(2) + 0.1 * torch.randn(300, D // 6, generator=generator(2))
        G = X.T @ X
        return (G.tril() + G.tril(-1).T).contiguous()

    @ALL
    @pytest.mark.parametrize("dtype", first_is_fast([torch.bfloat16, torch.float32]))
    @pytest.mark.parametrize(
        ("method", "options", "cross"),
        [
            *(("sparsefw", dict(refit=refit), cross) for refit in (0, 4) for cross in (False, True)),
            *((method, {}, False) for method in METHODS if method != "sparsefw"),
        ],
    )
    def test_nothing_revives(self, method, options, cross, dtype, text):
        layers, masks = self.layers(dtype), []
        given = make_crosses() if cross else None
        config = config_of(method, text, keep_zeros=True, **options)
        pruned, results = run(layers, self.gram(), method, config, crosses=given, masks=masks)
        for (name, W), row, mask in zip(layers, results, torch.cat(masks)[: sum(ROWS)].split(ROWS), strict=True):
            Z = pruned[name]
            assert (Z[W == 0] == 0).all()
            assert (Z[~mask] == 0).all()
            assert row.kept == mask.sum()
            # Weights of 16 bits may be rounded to zero.
            if text == "0.6" and options.get("refit") and dtype == torch.float32:
                budget = patterns.parse(text).kept(D)
                assert torch.equal((Z != 0).sum(1), (W != 0).sum(1).clamp(max=budget))
            if METHODS[method].frank_wolfe:
                assert row.error <= row.error_warm_start * (1 + 1e-6)


class TestSolveLayer:
    """One layer, for callers with a loop of their own."""

    @ALL
    @pytest.mark.parametrize("method", ["sparsefw", "sparsegpt", "ria"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_as_prune_layers(self, dtype, method, text):
        """Also of tensors that record gradients, as those of a hook in a forward pass, and under autocast."""
        config = config_of(method, text)
        W, G = make_layer(37, dtype)
        B = 200 * torch.randn(37, D, generator=generator(50)) if method == "sparsefw" else None
        before = W.clone(), G.clone()
        masks = []
        crosses = [None if B is None else Cross("outputs", B.clone())]
        pruned, (row,) = run([("mine", W)], G, config.method, config, masks=masks, crosses=crosses)
        recorded = [None if x is None else x.clone().requires_grad_() for x in (W, G, B)]
        with torch.autocast("cpu", torch.bfloat16):
            mask, Z, result = solve_layer(recorded[0], recorded[1], config, name="mine", B=recorded[2])
        assert torch.equal(Z, pruned["mine"])
        assert not Z.requires_grad
        assert torch.equal(mask, torch.cat(masks)[:37])
        assert replace(result, seconds=0) == replace(row, seconds=0)
        assert_equal((W, G), before)
        assert (Z.dtype, Z.shape, mask.dtype, mask.shape) == (dtype, W.shape, torch.bool, W.shape)

    def test_default(self):
        """That of a run whose blocks are not reconstructed."""
        W, G = make_layer(5, torch.float32)
        mask, Z, result = solve_layer(W, G)
        for config in (PruneConfig(), PruneConfig(reconstruct=0), PruneConfig(steps=24, refit=4)):
            same_mask, same, _ = solve_layer(W, G, config)
            assert torch.equal(mask, same_mask)
            assert torch.equal(Z, same)
        assert (result.pattern, result.method, result.steps) == ("0.6", "sparsefw", 24)

    def test_on_a_cpu_beside_a_gpu_it_is_the_same(self, monkeypatch):
        W, G = make_layer(5, torch.float32)
        _, expected, _ = solve_layer(W, G)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert torch.equal(solve_layer(W, G)[1], expected)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("W", [[1.0]]), ("W", torch.ones(2, 4).double()), ("G", torch.eye(3)), ("B", torch.eye(4)), ("config", "2:4")],
        ids=str,
    )
    def test_refuses_bad_input(self, name, value):
        with pytest.raises(InputError, match=f"^{name}: "):
            solve_layer(**dict(W=torch.ones(2, 4), G=torch.eye(4)) | {name: value})
        with pytest.raises(InputError, match="B: wanda"):
            solve_layer(torch.ones(2, 4), torch.eye(4), PruneConfig(method="wanda"), B=torch.ones(2, 4))


class TestFailures:
    @pytest.mark.parametrize("value", first_is_fast([math.nan, math.inf]))
    @pytest.mark.parametrize("where", ["W", "G", "B"])
    @pytest.mark.parametrize(("method", "text"), [*((m, "0.6") for m in METHODS), ("sparsefw", "layer:0.6")])
    def test_not_finite(self, method, text, where, value):
        inputs = dict(zip("WG", make_layer(3), strict=True))
        if where == "B":
            if not METHODS[method].dense_target:
                return
            inputs["B"] = torch.randn(3, D, generator=generator(50))
        inputs[where][1, 2] = inputs[where][2, 1] = value
        with pytest.raises(FloatingPointError, match=r"^mine: .*(not finite|NaN or Inf)"):
            solve_layer(**inputs, config=config_of(method, text), name="mine")

    @pytest.mark.parametrize("method", METHODS)
    def test_too_large_for_errors(self, method):
        W, G = make_layer(3, torch.float32)
        with pytest.raises(FloatingPointError, match=r"^mine: .*too large"):
            solve_layer(1e30 * W, G, config_of(method), name="mine")

    @pytest.mark.parametrize("options", [{"refit": 0}, {"refit": 2}, {"preset": "paper"}])
    def test_a_weight_that_the_warm_start_keeps(self, options):
        """Without a step, no error depends on it."""
        W, G = make_layer(3)
        W[1, 3] = math.inf
        config = PruneConfig(steps=0, kernel="torch", precision="ieee", **options)
        with pytest.raises(FloatingPointError, match=r"^mine: .*(not finite|NaN or Inf)"):
            solve_layer(W, G, config, name="mine")

    def test_too_large_on_the_way(self):
        """What overflows in SparseGPT's sweep reaches later columns; refits are only taken where they are better."""
        W = 1e38 * torch.rand(3, 2 * 128 + D, generator=generator(1))
        with pytest.raises(FloatingPointError, match=r"^mine: .*too large"):
            solve_layer(W, make_gram(W.shape[1]), PruneConfig("2:4", "sparsegpt"), name="mine")
        # Kept weights grow where they make up for others.
        W, G = torch.full((3, D), 6e4, dtype=torch.float16), torch.ones(D, D) + torch.eye(D)
        with pytest.raises(FloatingPointError, match=r"^mine: .*too large"):
            solve_layer(W, G, PruneConfig("0.6", "sparsegpt"), name="mine")
        _, Z, result = solve_layer(W, G, make_config("0.6"))
        assert Z.isfinite().all()
        assert result.error <= result.error_warm_start

    # Some squares are below the smallest normal number, so that their reciprocals overflow.
    def test_a_warm_start_without_error(self):
        """Wanda loses nothing of these rows; SparseGPT has a budget for each block of columns."""
        W = torch.zeros(3, 256)
        W[:, :64] = torch.randn(3, 64, generator=generator(2))
        for method in METHODS:
            _, _, result = solve_layer(W, make_gram(256), PruneConfig("0.6", method))
            assert result.error_warm_start == 0
            expected = math.inf if method == "sparsegpt" else 1.0
            assert (result.relative_mask, result.relative_error) == (expected, expected)


def test_methods_beside_the_paper_s_whole_matrix():
    """Rows of compared methods have the budget as ever; the paper's errors and gap are of all rows together."""
    config = PruneConfig(preset="paper", sparsity="layer:0.6", compare=("wanda",), steps=50)
    layers = make_layers()
    by_method = {name: run(layers, method=name, config=config) for name in config.methods}
    assert_same(by_method["wanda"], run(layers, method="wanda", config=PruneConfig("layer:0.6", "wanda")))
    for pruned, rows in by_method.values():
        for (name, W), row in zip(layers, rows, strict=True):
            assert (pruned[name] != 0).sum() == row.kept == W.numel() - int(config.pattern.sparsity * W.numel())
    assert all(0 <= row.gap <= row.error == row.error_mask for row in by_method["sparsefw"][1])
