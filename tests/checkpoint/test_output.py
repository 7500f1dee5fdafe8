"""--overwrite deletes an older output, and nothing else."""

import pytest
from helpers.checkpoints import make_hub_cache, refused

from sparsefw.checkpoint.files import check_output


@pytest.fixture
def old(tmp_path):
    """An older output."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    return tmp_path / "old"


def test_what_may_be_replaced(old, folder, monkeypatch):
    with refused("exists and is not empty; choose another folder or add overwrite=True"):
        check_output(old, folder, False)
    check_output(old, folder, True)
    (old / "config.json").rename(old / "report.json")
    check_output(old, folder, True)
    (old / "report.json").rename(old / "thesis.tex")
    with refused("not a checkpoint .*, so overwrite=True will not remove it"):
        check_output(old, folder, True)
    with refused("a file; give a folder"):
        check_output(folder / "config.json", old, True)
    monkeypatch.chdir(old)
    with refused("the current folder, which cannot be replaced"):
        check_output(old, folder, True)


@pytest.mark.parametrize("place", [".", "..", "sub/dir", "../source", "link"])
def test_the_model_stays(folder, place):
    """An output that is its folder, holds it or lies in it, by whatever name."""
    (folder.parent / "link").symlink_to(folder)
    output = folder.parent / "link" if place == "link" else folder / place
    with refused("is, holds or lies in .*, which is read"):
        check_output(output, folder, True)


def test_a_model_in_the_hubs_cache_stays(folder, hub):
    snapshot = make_hub_cache(folder, hub)
    for output in (snapshot, snapshot.parent.parent / "blobs", hub):
        with refused("is, holds or lies in .*, which is read"):
            check_output(output, snapshot, True)
    check_output(hub / "pruned", snapshot, True)


def test_a_text_that_a_run_reads_stays(old, folder):
    """Also a text elsewhere to which a link in the output leads, and a text in the output to which a link leads."""
    outside, linked, link = old.parent / "text.txt", old / "linked.txt", old.parent / "link.txt"
    outside.write_text("")
    linked.symlink_to(outside)
    link.symlink_to(old / "config.json")
    for text in (old / "config.json", linked, link):
        with refused(f"{text.name} lies in it, and would be deleted with it"):
            check_output(old, folder, True, [text])
    check_output(old, folder, True, [outside])
