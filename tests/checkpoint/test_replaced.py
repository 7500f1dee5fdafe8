"""Output folders: what a run may replace, and what it never may."""

from pathlib import Path

import pytest
from helpers.checkpoints import make_hub_cache, refused

from sparsefw.checkpoint import replaced
from sparsefw.checkpoint.replaced import check_free, check_output


@pytest.mark.parametrize("output", ["source", "source/pruned", ".", "other/../source", "link", "link/pruned"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_must_not_meet_the_input(folder, tmp_path, output, overwrite):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(folder)
    with refused("is, holds or lies in the input folder"):
        check_output(tmp_path / output, folder, overwrite)


def test_output_must_not_meet_the_hub_cache_of_the_input(folder, hub):
    snapshot = make_hub_cache(folder, hub)
    with refused("is, holds or lies in the input folder"):
        check_output(snapshot.parent.parent / "blobs", snapshot, True)


def test_output_that_is_there_already(folder, tmp_path):
    output = tmp_path / "pruned"
    check_output(output, folder, False)
    output.mkdir()
    check_output(output, folder, False)
    (output / "notes.txt").write_text("mine")
    with refused("exists and is not empty; choose another --output or add --overwrite"):
        check_output(output, folder, False)
    with refused(r"not a checkpoint \(no config.json\), so --overwrite will not remove it"):
        check_output(output, folder, True)
    (output / "config.json").write_text("{}")
    check_output(output, folder, True)
    with refused("exists and is not empty"):
        check_output(output, folder, False)
    with refused("notes.txt: a file; --output is a folder"):
        check_output(output / "notes.txt", folder, True)


def test_output_around_the_current_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "pruned" / "notes").mkdir(parents=True)
    (tmp_path / "pruned" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "pruned" / "notes")
    with refused(r"\.\.: the current folder lies in it, and would be deleted; choose another --output"):
        check_output(Path(".."), folder, True)
    # This path leads to the same place afterwards.
    check_output(tmp_path / "pruned", folder, True)


def test_output_that_is_a_mount_point(folder):
    with refused("a mount point"):
        check_output(Path("/proc"), folder, True)


@pytest.fixture
def output(tmp_path):
    """A checkpoint that may be replaced, with a text in it."""
    output = tmp_path / "pruned"
    (output / "texts").mkdir(parents=True)
    (output / "config.json").write_text("{}")
    (output / "texts" / "c.txt").write_text("text")
    return output


def test_a_file_that_the_run_reads_is_never_deleted(folder, output, tmp_path):
    check_output(output, folder, True, [tmp_path / "other.txt", folder / "config.json"])
    # By its path, from another folder, and by links to it, to its folder and to the output.
    (tmp_path / "c.txt").symlink_to(output / "texts" / "c.txt")
    (tmp_path / "texts").symlink_to(output / "texts")
    (tmp_path / "link").symlink_to(output)
    for path in ("pruned/texts/c.txt", "pruned/../pruned/texts", "c.txt", "texts/c.txt", "link/texts/c.txt"):
        with refused(f"pruned: .*{path} lies in .*pruned, and would be deleted with it"):
            check_output(output, folder, True, [tmp_path / path])
        with refused("and would be deleted with it"):
            check_output(tmp_path / "link", folder, True, [tmp_path / path])


def test_neither_is_a_link_that_the_run_reads(folder, output, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("text")
    (output / "text.txt").symlink_to(tmp_path / "elsewhere.txt")
    (output / "model").symlink_to(folder)
    with refused("text.txt lies in .*pruned, and would be deleted"):
        check_output(output, folder, True, [output / "text.txt"])
    with refused("model lies in .*pruned, and would be deleted"):
        check_output(output, output / "model", True)


def test_links_that_lead_back_to_themselves(folder, output, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for check in (lambda: check_output(tmp_path / "loop", folder, True), lambda: check_free(tmp_path / "loop", True)):
        with refused("loop: a link that leads back to itself"):
            check()
    with refused("loop: a link that leads back to itself"):
        check_output(output, folder, True, [tmp_path / "loop"])


def test_nor_is_what_lies_in_the_folder_of_an_unfinished_run(folder, tmp_path):
    with refused("lies in .*.pruned.partial, and would be deleted"):
        check_output(tmp_path / "pruned", folder, False, [tmp_path / ".pruned.partial" / "text.txt"])


def test_a_folder_that_is_mounted_twice(folder, output, tmp_path, monkeypatch):
    """Its paths differ, and only its number on the disk tells."""
    samefile, seen = Path.samefile, tmp_path / "mounted"
    monkeypatch.setattr(Path, "samefile", lambda a, b: {a, b} == {seen, output} or samefile(a, b))
    assert replaced._is_same(seen, output)
    with refused("and would be deleted with it"):
        check_output(output, folder, True, [seen / "texts" / "c.txt"])
    with refused("is, holds or lies in the input folder"):
        check_output(output, seen, True)
