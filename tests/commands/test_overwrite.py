"""--overwrite never deletes what the run reads."""

import pytest
from helpers.checkpoints import contents
from helpers.commands import TEXT, run
from helpers.families import save_model


@pytest.mark.parametrize("flags", [["--dataset", "old/text.txt"], ["--eval", "link.txt"], ["--model", "old/model"]])
def test_what_the_run_reads_stays(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = save_model(tmp_path / "old" / "model", "llama")
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "text.txt").write_text(TEXT)
    (tmp_path / "link.txt").symlink_to(tmp_path / "old" / "text.txt")
    other = save_model(tmp_path / "model", "llama") if "--model" not in flags else source
    before = contents(tmp_path)
    assert run(other, text, tmp_path / "old", "--overwrite", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"sparsefw: {tmp_path / 'old'}: ")
    assert f"{flags[1]} lies in " in error or f"lies in the input folder {flags[1]}" in error
    assert contents(tmp_path) == before
