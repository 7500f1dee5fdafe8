"""`--kernel torch` and `--kernel triton` prune a model to the same masks, and nearly the same weights."""

import pytest
import torch
from helpers.commands import run, tensors_of


@pytest.mark.slow
def test_kernels_agree(source, tmp_path, text):
    """A few steps in one block on a few windows go through every kernel."""
    flags = "--precision", "ieee", "--refit", "1", "--rounds", "1", "--kernel"
    outputs = []
    for kernel in ("torch", "triton"):
        assert run(source, text, tmp_path / kernel, *flags, kernel) == 0
        outputs.append(tensors_of(tmp_path / kernel))
    for name, weight in outputs[0].items():
        other = outputs[1][name]
        assert torch.equal(weight != 0, other != 0), name
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)
