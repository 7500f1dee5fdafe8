"""Weights that are zero stay zero with `keep_zeros`, and masks are no worse for it."""

import pytest
import torch
from helpers.kernel_inputs import generator
from helpers.layer_inputs import PATTERNS, D, assert_same, error, make_config, make_crosses, make_layers, run

from sparsefw.solver import METHODS, PruneConfig, patterns
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT
from sparsefw.solver.objective import damped
from sparsefw.solver.stack import TARGET_STEPS
from sparsefw.solver.target import find_target

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = pytest.mark.parametrize("text", PATTERNS)


def zeroed_layers(dtype=torch.float32):
    """Weights of one sign, with zeros in every row and every sixth column; some rows have fewer than they may keep."""
    layers = []
    for i, (name, W) in enumerate(make_layers(dtype=dtype)):
        W = W.abs()
        W[torch.rand(W.shape, generator=generator(70 + i)) < 0.1] = 0
        W[:, ::6] = 0
        W[::7, 9:] = 0
        layers.append((name, W))
    return layers


def summed_gram():
    """A Gram matrix where every sixth input is the sum of the next five, so that its weight could replace theirs."""
    X = torch.randn(300, D, generator=generator(0))
    X[:, ::6] = X.view(300, -1, 6)[:, :, 1:].sum(2) + 0.1 * torch.randn(300, D // 6, generator=generator(2))
    G = X.T @ X
    return (G.tril() + G.tril(-1).T).contiguous()


def config_of(method, text, refit, **options):
    if method != "sparsefw":
        return PruneConfig(text, method, kernel="torch", precision="ieee", **options)
    return make_config(text, refit=refit, **options)


def counts(text, W):
    """Numbers of nonzero weights by group, row or layer."""
    pattern = patterns.parse(text)
    shape = (1, 1, -1) if pattern.scope == "layer" else (len(W), -1, pattern.group or D)
    return (W != 0).view(shape).sum(2)


def most_kept(text, W):
    """The same numbers, at most the budget of each."""
    pattern = patterns.parse(text)
    budget = {
        "group": lambda: patterns.kept_in_group(pattern),
        "row": lambda: patterns.kept_in_row(pattern, D),
        "layer": lambda: patterns.kept_in_layer(pattern, *W.shape),
    }[pattern.scope]
    return counts(text, W).clamp(max=budget())


# Method, refit, and whether there are cross matrices.
CASES = [
    *(("sparsefw", refit, cross) for refit in (0, 4) for cross in (False, True)),
    *((method, 0, False) for method in METHODS if method != "sparsefw"),
]


class TestNothingRevives:
    @ALL
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("method", "refit", "cross"), CASES)
    def test_whatever_the_method(self, method, refit, cross, dtype, text):
        layers, G, masks = zeroed_layers(dtype), summed_gram(), []
        given = make_crosses() if cross else None
        config = config_of(method, text, refit, keep_zeros=True)
        pruned, results = run(layers, G, method, config, crosses=given, masks=masks)
        for (name, W), row, mask in zip(layers, results, masks, strict=True):
            Z = pruned[name]
            assert (Z[W == 0] == 0).all()
            assert (Z[~mask] == 0).all()
            assert row.kept == mask.sum()
            if text == "0.6" and method == "sparsegpt":
                # One budget covers all rows of a block of columns.
                assert (Z != 0).sum() <= len(W) * patterns.kept_in_row(config.pattern, D)
            else:
                assert (counts(text, Z) <= most_kept(text, W)).all()
            # Weights of 16 bits may be rounded to zero.
            if refit and dtype == torch.float32:
                assert torch.equal(counts(text, Z), most_kept(text, W))
            if method != "sparsegpt":
                assert row.error <= row.error_warm_start * (1 + 1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("method", "cross", "text"),
        [
            *(("sparsefw", cross, text) for cross in (False, True) for text in PATTERNS),
            # The budget of a block of columns goes to weights that are nonzero at that time; see `test_sparsegpt`.
            ("sparsegpt", False, "2:4"),
        ],
    )
    def test_without_it_something_does(self, method, cross, text, dtype):
        layers, given = zeroed_layers(dtype), make_crosses() if cross else None
        pruned, _ = run(layers, summed_gram(), method, config_of(method, text, refit=4), crosses=given)
        assert sum((pruned[name][W == 0] != 0).sum() for name, W in layers) > 10

    @ALL
    @pytest.mark.parametrize(("method", "refit", "cross"), CASES)
    def test_weights_without_zeros_are_pruned_as_ever(self, method, refit, cross, text):
        layers = make_layers(dtype=torch.float32)
        plain, keeping = (
            run(
                layers,
                summed_gram(),
                method,
                config_of(method, text, refit, keep_zeros=keep),
                crosses=make_crosses() if cross else None,
            )
            for keep in (False, True)
        )
        assert_same(plain, keeping)


class TestErrors:
    @ALL
    @pytest.mark.parametrize("refit", [0, 4])
    def test_no_row_is_worse_than_the_warm_start(self, refit, text):
        layers, G = zeroed_layers(), summed_gram()
        pruned, _ = run(layers, G, config=make_config(text, refit=refit, keep_zeros=True))
        warm, _ = run(layers, G, "wanda", PruneConfig(text, "wanda", kernel="torch", precision="ieee"))
        for name, W in layers:
            before, after = error(W, warm[name], G), error(W, pruned[name], G)
            assert (after <= before * (1 + 1e-5)).all()
            assert len(W) == 1 or after.sum() < before.sum()

    @ALL
    @pytest.mark.parametrize("refit", [0, 4])
    def test_the_target_is_one_that_the_weights_can_reach(self, refit, text):
        layers, G, given = zeroed_layers(), summed_gram(), make_crosses()
        config = make_config(text, refit=refit, keep_zeros=True)
        pruned, results = run(layers, G, config=config, crosses=make_crosses())
        for (name, W), cross, row in zip(layers, given, results, strict=True):
            support = W != 0
            T = find_target(W, damped(G, config.damp), cross.matrix, TARGET_STEPS, support=support)
            assert (T[~support] == 0).all()
            assert (T[support] != W[support]).double().mean() > 0.99
            # A row of a single weight fits its target up to the rounding of the weight.
            rounding = 2.0**-44 * error(T, torch.zeros_like(T), G).sum().item()
            assert row.error == pytest.approx(error(T, pruned[name], G).sum().item(), rel=1e-4, abs=rounding)

    @ALL
    def test_masks_are_chosen_for_it(self, text):
        """A re-selection that chose weights which must stay zero would waste the budget."""
        layers, G, sums = zeroed_layers(), summed_gram(), torch.zeros(2, dtype=torch.float64)
        keeping, _ = run(layers, G, config=make_config(text, refit=4, keep_zeros=True))
        free, _ = run(layers, G, config=make_config(text, refit=4))
        for name, W in layers:
            put_back = free[name].masked_fill(W == 0, 0)
            sums += torch.stack([error(W, Z, G).sum() for Z in (keeping[name], put_back)])
        assert sums[0] < 0.98 * sums[1]


class TestStacks:
    @ALL
    @pytest.mark.parametrize("cross", [False, True])
    def test_chunks_and_other_layers_change_nothing(self, cross, text):
        layers, config = zeroed_layers(), make_config(text, refit=3, keep_zeros=True)

        def given():
            return make_crosses() if cross else None

        whole = run(layers, config=config, memory=1 << 40, crosses=given())
        assert_same(whole, run(layers, config=config, memory=BYTES_PER_ENTRY * D * ROW_UNIT, crosses=given()))
        for i, layer in enumerate(layers):
            (pruned, _) = run([layer], config=config, crosses=given() and [given()[i]])
            assert torch.equal(pruned[layer[0]], whole[0][layer[0]])
