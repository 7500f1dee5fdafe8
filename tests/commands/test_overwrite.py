"""--overwrite never deletes what the run reads."""

import tempfile

import pytest
from helpers.checkpoints import contents
from helpers.commands import TEXT, run
from helpers.families import save_model
from huggingface_hub import constants


@pytest.mark.parametrize("flags", [
    ["--dataset", "old/text.txt"],
    ["--eval", "link.txt"],
    ["--model", "old/model"],
], ids=lambda flags: flags[-1])  # fmt: skip
def test_what_the_run_reads_stays(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = save_model(tmp_path / "old" / "model", "llama")
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "text.txt").write_text(TEXT)
    (tmp_path / "link.txt").symlink_to(tmp_path / "old" / "text.txt")
    other = save_model(tmp_path / "model", "llama") if "--model" not in flags else source
    before = contents(tmp_path)
    # Saving shows a progress bar.
    capsys.readouterr()
    assert run(other, text, tmp_path / "old", "--overwrite", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"sparsefw: {tmp_path / 'old'}: ")
    assert f"{flags[-1]} lies in " in error or f"lies in the input folder {flags[-1]}" in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("owner", "name"), [(constants, "HF_HOME"), (constants, "HF_HUB_CACHE"), (tempfile, "tempdir")]
)
def test_caches_and_temporary_files_stay(owner, name, text, tmp_path, monkeypatch, capsys):
    """Also where the output does not exist yet: at the end the cache would be in its place."""
    monkeypatch.setattr(owner, name, str(tmp_path / "old" / "sub"))
    model = save_model(tmp_path / "model", "llama")
    capsys.readouterr()
    assert run(model, text, tmp_path / "old") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "old/sub lies in " in error
