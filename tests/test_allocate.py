"""Unequal blocks end to end: what is kept over the whole model, and who keeps more."""

import json
import math
import types

import pytest
import torch
from families import save_model
from safetensors.torch import load_file, save_file

from sparsefw import allocation, checkpoint, patterns
from sparsefw import budgets as shared_out
from sparsefw.kernels import reference
from sparsefw.methods import Settings
from sparsefw.placement import Placement
from sparsefw.run import main
from sparsefw.stream import StreamedModel

TEXT = "".join(f"{n}: a rose is a rose is a rose, {n % 7} times.\n" for n in range(300))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model whose second block has a few weights far larger than the others."""
    folder = tmp_path_factory.mktemp("allocate") / "model"
    save_model(folder, "llama")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, W in tensors.items():
            if name.startswith("model.layers.1.") and W.dim() == 2:
                W[::3, ::7] *= 20
        save_file(tensors, path, metadata={"format": "pt"})
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def run(source, output, *flags):
    """The report, and kept weights by name."""
    places = ["--model", str(source), "--dataset", str(source.parent / "text.txt"), "--output", str(output)]
    common = ["--nsamples", "8", "--seqlen", "32", "--kernel", "torch", "--precision", "ieee", "--steps", "4"]
    assert main([*places, *common, "--refit", "1", "--rounds", "0", *flags]) == 0
    pruned = {}
    for path in output.glob("*.safetensors"):
        pruned |= load_file(path)
    report = json.loads((output / "report.json").read_text())
    return report, {row["name"]: (pruned[row["name"]] != 0) for row in report["layers"]}


@pytest.mark.parametrize("text", ["0.6", "layer:0.6"])
def test_model_keeps_exactly_what_uniform_keeps(source, tmp_path, text):
    uniform, kept_uniform = run(source, tmp_path / "uniform", "--sparsity", text)
    total = sum(kept.sum().item() for kept in kept_uniform.values())
    assert uniform["block_sparsities"] is None
    for how in ("owl", "error"):
        report, kept = run(source, tmp_path / how, "--sparsity", text, "--allocation", how)
        assert kept.keys() == kept_uniform.keys()
        assert sum(x.sum().item() for x in kept.values()) == total
        assert sum(row["kept"] for row in report["layers"]) == total
        sparsities = report["block_sparsities"]
        assert len(sparsities) == 3
        assert sum(sparsities) / 3 == pytest.approx(0.6, abs=1e-6)
        assert max(sparsities) - min(sparsities) > 0.02
        uneven = 0
        for i, sparsity in enumerate(sparsities):
            block = {name: x for name, x in kept.items() if name.startswith(f"model.layers.{i}.")}
            assert len(block) == 7
            for x in block.values():
                # A whole weight per row at most.
                assert abs(1 - x.double().mean().item() - sparsity) <= 1.001 / x.shape[1]
                uneven += x.sum(1).unique().numel() > 1
        assert uneven <= 1 if text == "0.6" else uneven > 10
        if how == "owl":
            assert min(sparsities) == sparsities[1]


def allocate(source, how, text="0.6"):
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    windows = types.SimpleNamespace(ids=tokens, seqlen=32, n=8)
    model = StreamedModel(checkpoint.inspect(source), torch.device("cpu"))
    return shared_out.allocate(model, windows, how, Settings(patterns.parse(text)), reference, Placement(8))


def test_blocks_with_the_larger_relative_error_keep_more(source, monkeypatch):
    """Two of the blocks are made to lose ten times and a tenth of what they lose."""
    measure, factors = allocation.measure, iter([10.0, 0.1, 1.0])
    monkeypatch.setattr(allocation, "measure", lambda *a: measure(*a) * next(factors))
    sparsities, budgets = allocate(source, "error")
    assert sparsities[0] < sparsities[2] < sparsities[1]
    for name, k in budgets[0].items():
        assert k > budgets[1][name]


@pytest.mark.parametrize("how", ["owl", "error"])
def test_blocks_are_measured_on_what_the_dense_model_feeds_them(source, how, monkeypatch):
    """Their inputs' Gram matrices against hooks in the whole model."""
    from transformers import AutoModelForCausalLM

    seen, measure = [], allocation.measure

    def spy(how, layers, sparsity, ops):
        seen.append([(tuple(W.shape), G.clone()) for W, G in layers])
        assert sparsity == patterns.parse("0.6").sparsity
        return measure(how, layers, sparsity, ops)

    monkeypatch.setattr(allocation, "measure", spy)
    sparsities, budgets = allocate(source, how)
    whole, grams = AutoModelForCausalLM.from_pretrained(source), {}
    for name, module in whole.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(module, x, name=name):
                X = x[0].reshape(-1, x[0].shape[-1]).double()
                grams[name] = X.T @ X

            module.register_forward_pre_hook(hook)
    tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole(tokens)
    assert len(seen) == len(budgets) == len(sparsities) == 3
    for i, block in enumerate(seen):
        assert len(block) == 7
        for (shape, G), name in zip(block, budgets[i], strict=True):
            module = whole.model.layers[i].get_submodule(name.removesuffix(".weight"))
            assert tuple(module.weight.shape) == shape
            truth = grams[f"{i}.{name.removesuffix('.weight')}"]
            torch.testing.assert_close(G.double(), truth, rtol=0, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize("text", ["0.6", "layer:0.6"])
def test_budgets_are_by_row_or_by_layer(source, text):
    _, budgets = allocate(source, "error", text)
    # q, k, v, o, gate, up, down.
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    pattern = patterns.parse(text)
    total = 0
    for block in budgets:
        for (rows, d), kept in zip(shapes, block.values(), strict=True):
            if text == "0.6":
                total += kept.sum().item() if isinstance(kept, torch.Tensor) else rows * kept
                assert 0 < torch.as_tensor(kept).max() <= d
            else:
                assert isinstance(kept, int)
                total += kept
    one = patterns.kept_in_row if text == "0.6" else patterns.kept_in_layer
    per_layer = [rows * one(pattern, d) if text == "0.6" else one(pattern, rows, d) for rows, d in shapes]
    assert total == 3 * sum(per_layer)
    assert math.isclose(total / (3 * sum(r * d for r, d in shapes)), 0.4, abs_tol=0.03)
