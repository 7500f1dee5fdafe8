"""What a pass is expected to take."""

import pytest
import torch
from helpers.families import save_model

from sparsefw.checkpoint import inspect
from sparsefw.evaluation.room import trial_bytes
from sparsefw.model import shape_of


@pytest.mark.parametrize(("family", "entries"), [("llama", 32 * 48), ("qwen3_moe", 32 * 48), ("gpt2", 32 * 96)])
def test_trial_in_half_precision(family, entries, tmp_path):
    save_model(tmp_path / "half", family, torch.bfloat16)
    save_model(tmp_path / "whole", family)
    assert trial_bytes(shape_of(inspect(tmp_path / "half"))) == 4 * entries
    assert trial_bytes(shape_of(inspect(tmp_path / "whole"))) == 0
