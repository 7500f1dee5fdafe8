"""Models that their own library writes in place of the shards: until they are there, the shards are."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.checkpoints import TENSORS, contents, refused
from safetensors.torch import save_file

from sparsefw.checkpoint import writer
from sparsefw.checkpoint.resume import PartialFolder
from sparsefw.checkpoint.writer import Writer


def save(folder: Path) -> None:
    """The tensors in one file, which has the name of a shard."""
    save_file(TENSORS, folder / "model-00001-of-00002.safetensors")


def begin(output: Path) -> None:
    """Write both shards, and stop."""
    with suppress(KeyboardInterrupt), Writer(output, 2, overwrite=True) as begun:
        begun.write({"a": TENSORS["a"], "b": TENSORS["b"]})
        begun.write({"c": TENSORS["c"]})
        raise KeyboardInterrupt


def finish(output: Path, overwrite: bool = True, prepare: Callable[[], object] = lambda: None) -> None:
    """Go on after the shards; `prepare` is called before the end."""
    with Writer(output, 2, overwrite=overwrite) as going_on:
        assert going_on.finished == [None, None]
        (going_on.folder / "report.json").write_text("{}")
        prepare()
        going_on.finish_as(save)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Path, "rename"), (writer, "file_digest"), (writer, "check_free"), (PartialFolder, "move_into_place")],
)
def test_goes_on_after_an_interruption_at_any_step(owner, name, after, tmp_path, monkeypatch):
    output, step = tmp_path / "pruned", getattr(owner, name)
    begin(output)
    finish(output)
    whole = contents(output)
    assert sorted(whole) == ["SHA256SUMS", "model-00001-of-00002.safetensors", "report.json"]

    def interrupted(*args):
        if after:
            step(*args)
        raise KeyboardInterrupt

    begin(output)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        finish(output, prepare=lambda: patched.setattr(owner, name, interrupted))
    assert contents(output) == whole
    finish(output)
    assert contents(output) == whole
    assert os.listdir(tmp_path) == ["pruned"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "pruned"
    begin(output)

    def meanwhile(folder):
        save(folder)
        output.mkdir()
        (output / "mine").touch()

    with refused("exists and is not empty"), Writer(output, 2) as going_on:
        going_on.finish_as(meanwhile)
    assert os.listdir(output) == ["mine"]
    (output / "mine").unlink()
    finish(output, overwrite=False)


def test_what_a_kill_leaves_is_deleted(tmp_path):
    """Before disk space is counted."""
    begin(tmp_path / "pruned")
    partial = tmp_path / ".pruned.partial"
    (partial / "saved-x7").mkdir()
    save(partial / "saved-x7")
    with suppress(KeyboardInterrupt), Writer(tmp_path / "pruned", 2):
        assert sorted(os.listdir(partial)) == ["identity.json", "lock", "new", "records"]
        raise KeyboardInterrupt


def test_a_kill_while_the_shards_are_deleted_is_no_damage(tmp_path, monkeypatch):
    output, rmtree = tmp_path / "pruned", shutil.rmtree
    begin(output)

    def in_part(path, *args, **options):
        if path == tmp_path / ".pruned.partial":
            (path / "new" / "model-00001-of-00002.safetensors").unlink()
        else:
            rmtree(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", in_part)
        finish(output)
    assert (tmp_path / ".pruned.partial" / "records" / "00002.json").exists()
    begin(output)
    finish(output)
