"""`--ignore` and `--keep-zeros` through whole runs."""

import pytest
import torch
from helpers.commands import run
from helpers.families import first_is_fast
from safetensors.torch import load_file, save_file

from sparsefw.verify import main as verify_main


@pytest.mark.parametrize(
    "flags", first_is_fast([["--sparsity", "2:4"], ["--method", "sparsegpt", "--sparsity", "0.1"]]), ids=" ".join
)
def test_fewer_weights_than_the_pattern_keeps_are_as_they_should_be(flags, source, out, text):
    """A group with more zeros than the pattern removes has fewer weights left than the pattern keeps."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if "_proj" in name:
                weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    assert run(source, text, out, "--keep-zeros", *flags) == 0
    assert verify_main([str(out)]) == 0


def test_a_layer_that_does_not_fit_the_pattern_is_found_before_the_run(source, out, text, capsys):
    assert run(source, text, out, "--method", "wanda", "--sparsity", "16:32") == 2
    said = capsys.readouterr()
    assert "model.layers.0.mlp.down_proj.weight: 48 inputs do not divide into groups of 32" in said.err
    assert "memory: " not in said.out
    flags = ["--method", "wanda", "--sparsity", "16:32", "--ignore", "down_proj"]
    assert run(source, text, out, *flags) == 0
