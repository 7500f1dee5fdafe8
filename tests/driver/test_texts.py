"""Texts of a run keep to its memory."""

import pytest
import torch
from helpers.commands import run
from helpers.families import save_model

from sparsefw.data import memory


@pytest.mark.parametrize("flags", [[], ["--eval", "{text}"]], ids=["calibration", "evaluation"])
def test_a_text_that_memory_has_no_room_for(flags, tmp_path, monkeypatch, capsys):
    """It is refused before the first block, and names what to change."""
    source = save_model(tmp_path / "model", "llama", torch.float32)
    text = tmp_path / "text.txt"
    text.write_text("some words and more of them\n" * 2000)
    monkeypatch.setattr(memory, "ALWAYS_READ", 1000 if flags else 500)
    capsys.readouterr()
    flags = [flag.format(text=text) for flag in flags]
    assert run(source, text, tmp_path / "out", *flags, "--host-memory", "0.1") == 2
    error = capsys.readouterr().err
    assert f"sparsefw: {text}: memory has no room for more than {1000 if flags else 500} tokens of this text" in error
    assert ("--eval-windows" in error) == bool(flags)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
