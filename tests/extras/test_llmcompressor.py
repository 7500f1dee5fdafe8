"""SparseFWModifier in recipes of llm-compressor, on the built-in model."""

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor", reason="takes llm-compressor; `make test-llmcompressor` installs it and runs this")

import torch
from compressed_tensors.offload import load_offloaded_model
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

import sparsefw.default
from sparsefw import prune
from sparsefw.llmcompressor import SparseFWModifier

MODEL = Path(sparsefw.default.__file__).parent / "model"
WINDOWS = torch.randint(1024, (16, 64), generator=torch.Generator().manual_seed(0))


def pruned(recipe, model=None, **arguments):
    """The model's weights by name, after a recipe, or a modifier of these fields."""
    model = model or AutoModelForCausalLM.from_pretrained(MODEL)
    recipe = SparseFWModifier(**recipe) if isinstance(recipe, dict) else recipe
    windows = Dataset.from_dict({"input_ids": WINDOWS.tolist()})
    oneshot(model=model, recipe=recipe, dataset=windows, shuffle_calibration_samples=False, **arguments)
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.dim() == 2}


def zeros(weights, part=""):
    """Fractions of zeros in the layers that have `part` in their names, rounded."""
    return {round((w == 0).float().mean().item(), 2) for name, w in weights.items() if part in name and "proj" in name}


def test_layers_are_pruned_as_in_a_run_of_ours():
    ours, model = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32) for _ in range(2))
    prune(ours, dataset=WINDOWS, sparsity=0.6, target="layer", reconstruct=0, progress=False)
    weights = pruned(dict(sparsity=0.6), model)
    assert zeros(weights) == {0.59, 0.6}
    for name, weight in weights.items():
        # They compute attention by another function, so that inputs behind it are rounded differently.
        expected, first = ours.get_parameter(name), "layers.0.self_attn.q_proj" in name
        assert ((weight == 0) == (expected == 0)).float().mean() > 0.96, name
        assert (weight - expected).norm() < (1e-3 if first else 0.25) * expected.norm(), name


def test_a_recipe_in_yaml_is_written_beside_the_model(tmp_path):
    recipe = """
      pruning_stage:
        pruning_modifiers:
          SparseFWModifier:
            mask_structure: "1:4"
            preset: fast
            ignore: [lm_head, model.layers.1.mlp.down_proj, "re:.*q_proj"]
    """
    dense = {name: w.clone() for name, w in AutoModelForCausalLM.from_pretrained(MODEL).named_parameters()}
    weights = pruned(recipe, output_dir=str(tmp_path))
    for name, weight in weights.items():
        if "proj" not in name or "q_proj" in name or name == "model.layers.1.mlp.down_proj.weight":
            assert torch.equal(weight, dense[name]), name
        else:
            assert ((weight == 0).view(len(weight), -1, 4).sum(2) == 1).all(), name
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, written.get_parameter(name)) for name, weight in weights.items())
    assert "SparseFWModifier" in (tmp_path / "recipe.yaml").read_text()


def test_a_recipe_of_sparsegpt_runs_under_our_name():
    theirs = dict(block_size=128, dampening_frac=0.05)
    expected, found = (pruned(dict(sparsity=0.5, preset="fast") | own) for own in (dict(damp=0.05), theirs))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_every_block_has_its_own_sparsity():
    weights = pruned(dict(preset="fast", targets=["LlamaDecoderLayer"], sparsity=[0, 0.25, 0.5, 0.75]))
    assert [zeros(weights, f".{block}.") for block in range(4)] == [{0.0}, {0.25}, {0.5}, {0.75}]


@pytest.mark.parametrize("targets", ["Linear", "LlamaDecoderLayer"])
def test_a_profile_of_outliers(targets):
    weights = pruned(dict(preset="fast", targets=targets, sparsity=0.5, sparsity_profile="owl", owl_m=5, owl_lmbda=0.1))
    fractions = [max(zeros(weights, f".{block}.")) for block in range(4)]
    assert max(fractions) - min(fractions) > 0.1
    assert sum(fractions) / 4 == pytest.approx(0.5, abs=0.03)


def test_where_matrices_and_weights_wait_changes_nothing(tmp_path):
    fields = dict(sparsity=0.5, preset="fast")
    expected = pruned(fields)
    homes = {f"model.layers.{block}": "disk" if block % 2 else "cpu" for block in range(4)}
    homes |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(MODEL, device_map=homes, offload_folder=tmp_path)
    for weights in (pruned(fields | dict(offload_hessians=True)), pruned(fields, model)):
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_zeros_are_preserved():
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    kept = {name: torch.rand(w.shape) < 0.8 for name, w in model.named_parameters() if "proj" in name}
    for name, mask in kept.items():
        model.get_parameter(name).data.mul_(mask)
    weights = pruned(dict(sparsity=0.5, preserve_sparsity_mask=True), model)
    assert not any(weights[name][~mask].any() for name, mask in kept.items())


def test_the_example_prunes_and_quantises(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples/llmcompressor_recipe.py"))["main"]
    main(str(MODEL), str(tmp_path), Dataset.from_dict({"input_ids": WINDOWS.tolist()}), max_seq_length=64)
    fractions = re.findall(r"proj: ([\d.]+)% zeros", capsys.readouterr().out)
    assert len(fractions) == 7
    assert all(float(fraction) >= 50 for fraction in fractions)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(), "sparsity: missing"),
        (dict(sparsity=0.6, mask_structure="2:4"), "fixes the sparsity"),
        (dict(sparsity=[0.5, 1.5]), "sparsity='1.5': expected a fraction between 0 and 1"),
        (dict(sparsity=0.5, preset="fastest"), "preset='fastest': expected one of"),
        (dict(sparsity=0.5, stps=3), "stps"),
        (dict(sparsity=0.5, damp=0.1, dampening_frac=0.1), "dampening_frac=0.1: is damp, which is given, too"),
    ],
)
def test_mistakes_are_found_before_the_calibration(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseFWModifier(**fields)
